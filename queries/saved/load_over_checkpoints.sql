-- load_over_checkpoints: how much the load of each expert varies over the checkpoints of a training run.
-- One row per series, reference run, layer and expert. Checkpoints are the complete runs of a series that have a
-- train_step; those with an equal tokens_key and as many experts at the same layers form a group, named by its last
-- checkpoint (as in load_drift). share is the expert's share of the layer's choices in a checkpoint (expert_load):
--   least, p5, p50, p95, most = percentiles of share over the checkpoints, interpolated between two of them
--   even                      = 1 / E
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   series (series): default every series.
--   layer (layer): default every layer.
with ranked as (
    -- place: 0-based position of a share among its expert's n shares; percentile q is at q (n - 1), between two of them
    select
        series_checkpoints.series as series,
        series_checkpoints.reference_run_id as reference_run_id,
        expert_load.layer as layer,
        expert_load.expert as expert,
        expert_load.share as share,
        layers.num_experts as num_experts,
        row_number() over (
            partition by series_checkpoints.series, series_checkpoints.reference_run_id, expert_load.layer, expert_load.expert
            order by expert_load.share asc
        ) - 1 as place,
        count(*) over (
            partition by series_checkpoints.series, series_checkpoints.reference_run_id, expert_load.layer, expert_load.expert
        ) - 1 as last_place
    from series_checkpoints
    join expert_load
        on expert_load.run_id = series_checkpoints.run_id
    join layers
        on layers.run_id = expert_load.run_id
        and layers.layer = expert_load.layer
    where expert_load.share is not null
        and (getvariable('layer') is null or expert_load.layer = getvariable('layer'))
)
select
    series,
    reference_run_id,
    layer,
    expert,
    count(*)::bigint as checkpoints,
    min(share) as least,
    sum(share * greatest(1 - abs(place - 0.05::double * last_place), 0)) as p5,
    sum(share * greatest(1 - abs(place - 0.5::double * last_place), 0)) as p50,
    sum(share * greatest(1 - abs(place - 0.95::double * last_place), 0)) as p95,
    max(share) as most,
    1::double / max(num_experts) as even
from ranked
group by
    series,
    reference_run_id,
    layer,
    expert
order by series, reference_run_id, layer, expert
