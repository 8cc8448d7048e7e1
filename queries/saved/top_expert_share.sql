-- top_expert_share: how much of each domain's routing the most used expert of a layer takes.
-- One row per run, domain and layer with tokens of the domain. NULL counts as a domain. Over tokens of kind prompt
-- and generated: N_iD of the domain's N_D tokens routed to expert i, k experts per token:
--   top_expert         = the expert with the most tokens (ties: the lowest)
--   share_of_tokens    = N_iD / N_D of that expert           k / E if the load is even
--   share_of_choices   = N_iD / (k N_D) of that expert       1 / E if the load is even
--   first_choice_share = the largest share of first choices that one expert has; NULL if ranks are not known
--   experts_over_half  = the smallest number of experts that together take over 50 % of the choices
-- MoE Lens (arXiv:2603.05806) finds that a few experts make over half of a domain's decisions.
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with chosen as (
    select
        run_id,
        domain,
        layer,
        expert,
        sum(tokens)::bigint as tokens,
        sum(first_choice_tokens)::bigint as first_choice_tokens
    from expert_counts
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        domain,
        layer,
        expert
),
ranked as (
    select
        run_id,
        domain,
        layer,
        expert,
        tokens,
        row_number() over (partition by run_id, domain, layer order by tokens desc, expert asc) as place,
        (sum(tokens) over (partition by run_id, domain, layer))::bigint as choices,
        (sum(tokens) over (
            partition by run_id, domain, layer
            order by tokens desc, expert asc
            rows between unbounded preceding and current row
        ))::bigint as choices_so_far,
        max(first_choice_tokens) over (partition by run_id, domain, layer) as most_first_choices,
        (sum(first_choice_tokens) over (partition by run_id, domain, layer))::bigint as first_choices
    from chosen
),
summed as (
    select
        run_id,
        domain,
        layer,
        max(case when place = 1 then expert end) as top_expert,
        max(tokens) as tokens,
        max(choices) as choices,
        max(most_first_choices) as most_first_choices,
        max(first_choices) as first_choices,
        (1 + sum(case when choices_so_far * 2 <= choices then 1 else 0 end))::bigint as experts_over_half
    from ranked
    group by
        run_id,
        domain,
        layer
)
select
    summed.run_id as run_id,
    summed.domain as domain,
    summed.layer as layer,
    summed.top_expert as top_expert,
    summed.tokens as tokens,
    summed.tokens::double * layers.top_k / nullif(summed.choices, 0) as share_of_tokens,
    summed.tokens::double / nullif(summed.choices, 0) as share_of_choices,
    summed.most_first_choices::double / nullif(summed.first_choices, 0) as first_choice_share,
    summed.experts_over_half as experts_over_half
from summed
join layers
    on layers.run_id = summed.run_id
    and layers.layer = summed.layer
order by run_id, domain, layer
