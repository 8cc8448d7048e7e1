-- changed_tokens: the tokens whose routing differs most between two runs over the same tokens.
-- One row per token that has rows in both runs at the same layer, most changed first:
--   kept   = sum over those layers of |E_1 intersected with E_2| / sum of k    1: all experts the same
--   layers = MoE layers compared
-- k is the larger one if the runs' top_k differs. Over tokens of kind prompt and generated. For checkpoints of one model
-- over the same tokens (equal tokens_key, and as many experts at the same layers); otherwise equal token_ids or experts
-- have nothing to do with each other, and no rows are returned.
-- Parameters:
--   run (run): one run.
--   other_run (run of the same tokens): the other.
--   layer (layer): default every layer.
--   most (count): maximum number of rows; default 50.
with same_tokens as (
    select
        here.run_id as run_id,
        there.run_id as other_run_id
    from runs as here
    join runs as there
        on there.tokens_key = here.tokens_key
    join experts_keys as here_experts
        on here_experts.run_id = here.run_id
    join experts_keys as there_experts
        on there_experts.run_id = there.run_id
        and there_experts.experts_key = here_experts.experts_key
    where here.run_id = getvariable('run')::varchar
        and there.run_id = getvariable('other_run')::varchar
),
paired as (
    -- one row per token and layer, with rank 0; without ranks, one for each pair of its choices
    select
        here.run_id as run_id,
        here.segment as segment,
        here.token_id as token_id,
        greatest(layers.top_k, there_layers.top_k) as top_k,
        ((case when here.rank is null then layers.top_k else 1 end)
        * (case when there.rank is null then there_layers.top_k else 1 end))::double as rows_here
    from same_tokens
    join routing as here
        on here.run_id = same_tokens.run_id
    join routing as there
        on there.run_id = same_tokens.other_run_id
        and there.layer = here.layer
        and there.token_id = here.token_id
    join layers
        on layers.run_id = here.run_id
        and layers.layer = here.layer
    join layers as there_layers
        on there_layers.run_id = there.run_id
        and there_layers.layer = there.layer
    where coalesce(here.rank, 0) = 0
        and coalesce(there.rank, 0) = 0
        and (getvariable('layer') is null or here.layer = getvariable('layer'))
),
compared as (
    select
        run_id,
        segment,
        token_id,
        round(sum(1 / rows_here))::bigint as layers,
        sum(top_k / rows_here) as choices
    from paired
    group by
        run_id,
        segment,
        token_id
),
shared as (
    select
        here.token_id as token_id,
        count(*)::bigint as choices
    from same_tokens
    join routing as here
        on here.run_id = same_tokens.run_id
    join routing as there
        on there.run_id = same_tokens.other_run_id
        and there.layer = here.layer
        and there.token_id = here.token_id
        and there.expert = here.expert
    where (getvariable('layer') is null or here.layer = getvariable('layer'))
    group by here.token_id
),
ranked as (
    select
        compared.token_id as token_id,
        token_domains.prompt_id as prompt_id,
        token_domains.position as position,
        token_domains.domain as domain,
        token_domains.token as token,
        compared.layers as layers,
        coalesce(shared.choices, 0)::double / compared.choices as kept,
        row_number() over (order by coalesce(shared.choices, 0)::double / compared.choices asc, compared.token_id asc) as place
    from compared
    join token_domains
        on token_domains.run_id = compared.run_id
        and token_domains.segment = compared.segment
        and token_domains.token_id = compared.token_id
    left join shared
        on shared.token_id = compared.token_id
    where token_domains.kind <> 'special'
)
select
    token_id,
    prompt_id,
    position,
    domain,
    token,
    layers,
    kept
from ranked
where place <= coalesce(getvariable('most'), 50)
order by place
