-- saturation_of_prompts: how the routing of the first prompts settles over the checkpoints of a training run.
-- One row per series, reference run, layer and checkpoint, in order of training. Same columns as
-- saturation_over_training, but over the tokens of the first prompts only, for runs that are too large to read in full.
-- If `prompts` includes all prompts, the results are equal.
-- Reads only the rows of those prompts.
-- Parameters:
--   prompts (count): number of prompts: those with a prompt_id below it; default 100.
--   series (series): default every series.
--   layer (layer): default every layer.
with ordered_runs as (
    select
        runs.run_id as run_id,
        runs.series as series,
        runs.tokens_key as tokens_key,
        experts_keys.experts_key as experts_key,
        runs.train_step as train_step,
        runs.train_tokens as train_tokens,
        row_number() over (
            partition by runs.series, runs.tokens_key, experts_keys.experts_key
            order by coalesce(runs.train_step, -1) desc, runs.run_id asc
        ) as place
    from runs
    join experts_keys
        on experts_keys.run_id = runs.run_id
    where runs.series is not null
        and runs.tokens_key is not null
        and (getvariable('series') is null or runs.series = getvariable('series')::varchar)
),
compared_runs as (
    select
        ordered_runs.run_id as run_id,
        ordered_runs.series as series,
        ordered_runs.train_step as train_step,
        ordered_runs.train_tokens as train_tokens,
        reference.run_id as reference_run_id
    from ordered_runs
    join ordered_runs as reference
        on reference.series = ordered_runs.series
        and reference.tokens_key = ordered_runs.tokens_key
        and reference.experts_key = ordered_runs.experts_key
        and reference.place = 1
    where reference.train_step is not null
),
choices as (
    -- a token_id is prompt_id * 2^24 + position
    select
        run_id,
        layer,
        token_id,
        expert
    from routing
    where token_id < coalesce(getvariable('prompts'), 100)::bigint * 16777216
        and kind <> 'special'
        and run_id in (select ordered_runs.run_id from ordered_runs)
        and (getvariable('layer') is null or layer = getvariable('layer'))
),
routed_tokens as (
    select distinct
        run_id,
        layer,
        token_id
    from choices
),
compared_tokens as (
    select
        compared_runs.run_id as run_id,
        here.layer as layer,
        count(*)::bigint as tokens
    from compared_runs
    join routed_tokens as here
        on here.run_id = compared_runs.run_id
    join routed_tokens as there
        on there.run_id = compared_runs.reference_run_id
        and there.layer = here.layer
        and there.token_id = here.token_id
    group by
        compared_runs.run_id,
        here.layer
),
shared_experts as (
    select
        compared_runs.run_id as run_id,
        here.layer as layer,
        count(*)::bigint as shared
    from compared_runs
    join choices as here
        on here.run_id = compared_runs.run_id
    join choices as there
        on there.run_id = compared_runs.reference_run_id
        and there.layer = here.layer
        and there.token_id = here.token_id
        and there.expert = here.expert
    group by
        compared_runs.run_id,
        here.layer
)
select
    compared_runs.series as series,
    compared_runs.reference_run_id as reference_run_id,
    compared_tokens.layer as layer,
    compared_runs.train_step as train_step,
    compared_runs.train_tokens as train_tokens,
    compared_runs.run_id as run_id,
    compared_tokens.tokens as tokens,
    coalesce(shared_experts.shared, 0)::double / (compared_tokens.tokens * layers.top_k) as saturation,
    there_layers.top_k::double / layers.num_experts as random
from compared_tokens
join compared_runs
    on compared_runs.run_id = compared_tokens.run_id
join layers
    on layers.run_id = compared_tokens.run_id
    and layers.layer = compared_tokens.layer
join layers as there_layers
    on there_layers.run_id = compared_runs.reference_run_id
    and there_layers.layer = compared_tokens.layer
left join shared_experts
    on shared_experts.run_id = compared_tokens.run_id
    and shared_experts.layer = compared_tokens.layer
order by series, reference_run_id, layer, train_step, run_id
