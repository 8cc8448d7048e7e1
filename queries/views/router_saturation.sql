-- router_saturation: how much of the final routing a training checkpoint has already reached.
-- One row per run, reference run and layer. The reference is the run with the largest train_step (the first by run_id if
-- there are several) among the runs of the series with an equal tokens_key and as many experts at the same layers: the
-- last checkpoint over the same tokens.
-- The reference run is also compared with itself, which gives 1.
-- Over tokens of kind prompt and generated with rows at the layer in both runs, E_t their k experts, E_T those of the
-- reference run, which are as many unless its top_k differs:
--   saturation = mean of |E_t intersected with E_T| / k    OLMoE (arXiv:2409.02060) Eq. 5, with top-k = k
--   random     = |E_T| / E                                 expected value for two independent even routers
-- Weights and ranks are ignored. A run without series, or with a tokens_key of its own, is compared only with itself; a
-- series without any train_step has no rows. Only tokens with rows in both runs are compared: see tokens.
-- Reads only the rows of the compared runs: filter on run_id and layer.
create or replace view router_saturation as
with ordered_runs as (
    select
        runs.run_id as run_id,
        runs.series as series,
        runs.tokens_key as tokens_key,
        experts_keys.experts_key as experts_key,
        runs.train_step as train_step,
        row_number() over (
            partition by runs.series, runs.tokens_key, experts_keys.experts_key
            order by coalesce(runs.train_step, -1) desc, runs.run_id asc
        ) as place
    from runs
    join experts_keys
        on experts_keys.run_id = runs.run_id
    where runs.series is not null
        and runs.tokens_key is not null
),
compared_runs as (
    select
        ordered_runs.run_id as run_id,
        ordered_runs.train_step as train_step,
        reference.run_id as reference_run_id
    from ordered_runs
    join ordered_runs as reference
        on reference.series = ordered_runs.series
        and reference.tokens_key = ordered_runs.tokens_key
        and reference.experts_key = ordered_runs.experts_key
        and reference.place = 1
    where reference.train_step is not null
),
compared_tokens as (
    select
        compared_runs.run_id as run_id,
        compared_runs.reference_run_id as reference_run_id,
        here.layer as layer,
        -- without ranks, a token has a row for each pair of its choices instead of one row of rank 0
        round(count(*)::double / max(
            (case when here.rank is null then layers.top_k else 1 end)
            * (case when there.rank is null then there_layers.top_k else 1 end)
        ))::bigint as tokens
    from compared_runs
    join routing as here
        on here.run_id = compared_runs.run_id
    join routing as there
        on there.run_id = compared_runs.reference_run_id
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
        and here.kind <> 'special'
    group by
        compared_runs.run_id,
        compared_runs.reference_run_id,
        here.layer
),
shared_experts as (
    select
        compared_runs.run_id as run_id,
        compared_runs.reference_run_id as reference_run_id,
        here.layer as layer,
        count(*)::bigint as shared
    from compared_runs
    join routing as here
        on here.run_id = compared_runs.run_id
    join routing as there
        on there.run_id = compared_runs.reference_run_id
        and there.layer = here.layer
        and there.token_id = here.token_id
        and there.expert = here.expert
    where here.kind <> 'special'
    group by
        compared_runs.run_id,
        compared_runs.reference_run_id,
        here.layer
)
select
    compared_tokens.run_id as run_id,
    compared_tokens.reference_run_id as reference_run_id,
    compared_runs.train_step as train_step,
    compared_tokens.layer as layer,
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
    on there_layers.run_id = compared_tokens.reference_run_id
    and there_layers.layer = compared_tokens.layer
left join shared_experts
    on shared_experts.run_id = compared_tokens.run_id
    and shared_experts.layer = compared_tokens.layer;

comment on view router_saturation is 'One row per run, reference run and layer: share of the last checkpoint''s experts already chosen, over the same tokens.';
comment on column router_saturation.run_id is 'The run these rows belong to: a checkpoint.';
comment on column router_saturation.reference_run_id is 'The run with the largest train_step among those of the series with the same tokens and numbers of experts.';
comment on column router_saturation.train_step is 'Training step of run_id; NULL if unknown.';
comment on column router_saturation.layer is 'Layer index in the model.';
comment on column router_saturation.tokens is 'Tokens with rows at the layer in both runs.';
comment on column router_saturation.saturation is 'Mean share of a token''s experts that the reference run also chooses.';
comment on column router_saturation.random is 'Experts per token of the reference run / E: expected saturation for two independent even routers.';
