-- coverage_curve: how many experts of each layer take 50, 80, 90 and 95 % of its choices.
-- One row per run, layer and coverage. Over tokens of kind prompt and generated:
--   experts      = the smallest number of experts that together take that share of the choices
--   even_experts = the same if the load is even: coverage * E, rounded up
--   experts_used = experts that any token chooses
-- Megatron-LM's tools for MoE routing draw the same curve.
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
--   domain (domain): default all tokens.
with chosen as (
    select
        run_id,
        layer,
        expert,
        sum(tokens)::bigint as tokens
    from expert_counts
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
        and (getvariable('domain') is null or domain = getvariable('domain')::varchar)
    group by
        run_id,
        layer,
        expert
),
ranked as (
    select
        run_id,
        layer,
        row_number() over (partition by run_id, layer order by tokens desc, expert asc) as place,
        count(*) over (partition by run_id, layer) as experts_used,
        (sum(tokens) over (partition by run_id, layer))::bigint as choices,
        (sum(tokens) over (
            partition by run_id, layer
            order by tokens desc, expert asc
            rows between unbounded preceding and current row
        ))::bigint as choices_so_far
    from chosen
),
percents as (
    select 50 as percent
    union all
    select 80 as percent
    union all
    select 90 as percent
    union all
    select 95 as percent
),
least_experts as (
    select
        ranked.run_id as run_id,
        ranked.layer as layer,
        percents.percent as percent,
        min(ranked.place)::bigint as experts,
        max(ranked.experts_used)::bigint as experts_used,
        max(ranked.choices)::bigint as choices
    from ranked
    cross join percents
    where ranked.choices_so_far * 100 >= ranked.choices * percents.percent
    group by
        ranked.run_id,
        ranked.layer,
        percents.percent
)
select
    least_experts.run_id as run_id,
    least_experts.layer as layer,
    least_experts.percent::double / 100 as coverage,
    least_experts.experts as experts,
    floor((least_experts.percent * layers.num_experts + 99)::double / 100)::bigint as even_experts,
    least_experts.experts_used as experts_used,
    layers.num_experts as num_experts,
    least_experts.choices as choices
from least_experts
join layers
    on layers.run_id = least_experts.run_id
    and layers.layer = least_experts.layer
order by run_id, layer, coverage
