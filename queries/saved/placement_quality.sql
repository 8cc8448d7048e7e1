-- placement_quality: how well a placement of experts on GPUs fits the load and routing of a run.
-- One row per run and MoE layer, for runs that have every expert of the placement. Over tokens of kind prompt and
-- generated; an expert may have copies on several GPUs: its load is then shared evenly, and a pair is together if some
-- GPU holds both.
--   imbalance        = load of the busiest GPU / mean load of all GPUs         1 if the load is even
--   pair_share       = share of the co-routed pairs of experts that are together on a GPU
--   transition_share = share of the transitions to the next MoE layer that stay on a GPU; NULL at the last layer
-- GPUs are those of the whole placement. unplaced_experts have no GPU: columns that depend on them are NULL.
-- Counts come from rollups, so the cost does not grow with tokens. A run that was imported as counts only has no pairs.
-- Parameters:
--   placement (placement): a Parquet or JSON file with layer, expert, gpu; in a shell as text: '0:0:0,0:1:3'.
--   run (run): default every run.
with listed_parts as (
    select unnest(string_split(getvariable('placement')::varchar, ',')) as part
),
placed as (
    select distinct
        split_part(part, ':', 1)::integer as layer,
        split_part(part, ':', 2)::integer as expert,
        split_part(part, ':', 3)::integer as gpu
    from listed_parts
),
-- a placement of another model is about other experts
other_models as (
    select distinct all_runs.run_id as run_id
    from (select distinct experts.run_id as run_id from experts) as all_runs
    cross join placed
    left join experts
        on experts.run_id = all_runs.run_id
        and experts.layer = placed.layer
        and experts.expert = placed.expert
    where experts.expert is null
),
copies as (
    select
        layer,
        expert,
        count(*) as gpus
    from placed
    group by
        layer,
        expert
),
all_gpus as (
    select count(distinct gpu) as gpus
    from placed
),
unplaced as (
    select
        experts.run_id as run_id,
        experts.layer as layer,
        sum(case when copies.gpus is null then 1 else 0 end)::bigint as experts
    from experts
    left join copies
        on copies.layer = experts.layer
        and copies.expert = experts.expert
    where (getvariable('run') is null or experts.run_id = getvariable('run')::varchar)
        and experts.run_id not in (select other_models.run_id from other_models)
    group by
        experts.run_id,
        experts.layer
),
gpu_loads as (
    select
        expert_load.run_id as run_id,
        expert_load.layer as layer,
        placed.gpu as gpu,
        sum(expert_load.tokens::double / copies.gpus) as load
    from expert_load
    join placed
        on placed.layer = expert_load.layer
        and placed.expert = expert_load.expert
    join copies
        on copies.layer = placed.layer
        and copies.expert = placed.expert
    where (getvariable('run') is null or expert_load.run_id = getvariable('run')::varchar)
    group by
        expert_load.run_id,
        expert_load.layer,
        placed.gpu
),
layer_loads as (
    select
        run_id,
        layer,
        max(load) as busiest,
        sum(load) as load
    from gpu_loads
    group by
        run_id,
        layer
),
pairs_together as (
    select distinct
        here.layer as layer,
        here.expert as expert_a,
        there.expert as expert_b
    from placed as here
    join placed as there
        on there.layer = here.layer
        and there.gpu = here.gpu
        and there.expert > here.expert
),
pair_shares as (
    select
        co_routing.run_id as run_id,
        co_routing.layer as layer,
        sum(case when pairs_together.layer is not null then co_routing.tokens else 0 end)::double
        / nullif(sum(co_routing.tokens), 0) as share
    from co_routing
    left join pairs_together
        on pairs_together.layer = co_routing.layer
        and pairs_together.expert_a = co_routing.expert_a
        and pairs_together.expert_b = co_routing.expert_b
    where co_routing.expert_a < co_routing.expert_b
        and (getvariable('run') is null or co_routing.run_id = getvariable('run')::varchar)
    group by
        co_routing.run_id,
        co_routing.layer
),
steps_together as (
    select distinct
        here.layer as layer,
        here.expert as expert,
        there.layer as next_layer,
        there.expert as next_expert
    from placed as here
    join placed as there
        on there.gpu = here.gpu
        and there.layer > here.layer
    where exists (
        select 1
        from layer_steps
        where layer_steps.layer = here.layer
            and layer_steps.next_layer = there.layer
    )
),
step_shares as (
    select
        layer_transitions.run_id as run_id,
        layer_transitions.layer as layer,
        layer_transitions.next_layer as next_layer,
        sum(case when steps_together.layer is not null then layer_transitions.tokens else 0 end)::double
        / nullif(sum(layer_transitions.tokens), 0) as share
    from layer_transitions
    left join steps_together
        on steps_together.layer = layer_transitions.layer
        and steps_together.expert = layer_transitions.expert
        and steps_together.next_layer = layer_transitions.next_layer
        and steps_together.next_expert = layer_transitions.next_expert
    where (getvariable('run') is null or layer_transitions.run_id = getvariable('run')::varchar)
    group by
        layer_transitions.run_id,
        layer_transitions.layer,
        layer_transitions.next_layer
)
select
    unplaced.run_id as run_id,
    unplaced.layer as layer,
    all_gpus.gpus as gpus,
    unplaced.experts as unplaced_experts,
    case when unplaced.experts = 0 then layer_loads.busiest * all_gpus.gpus / nullif(layer_loads.load, 0) end as imbalance,
    case when unplaced.experts = 0 then pair_shares.share end as pair_share,
    case when unplaced.experts = 0 and next_unplaced.experts = 0 then step_shares.share end as transition_share
from unplaced
cross join all_gpus
left join layer_loads
    on layer_loads.run_id = unplaced.run_id
    and layer_loads.layer = unplaced.layer
left join pair_shares
    on pair_shares.run_id = unplaced.run_id
    and pair_shares.layer = unplaced.layer
left join step_shares
    on step_shares.run_id = unplaced.run_id
    and step_shares.layer = unplaced.layer
left join unplaced as next_unplaced
    on next_unplaced.run_id = step_shares.run_id
    and next_unplaced.layer = step_shares.next_layer
order by run_id, layer
