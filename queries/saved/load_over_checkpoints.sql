-- load_over_checkpoints: how much the load of each expert varies over the checkpoints of a training run.
-- One row per series, reference run, layer and expert. Checkpoints are the complete runs of a series that have a
-- train_step; only those of equal tokens_key are together, named by the last of them (as in load_drift). share is the
-- expert's share of the layer's choices in a checkpoint (expert_load):
--   least, p5, p50, p95, most = percentiles of share over the checkpoints, interpolated between two of them
--   even                      = 1 / E
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   series (series): default every series.
--   layer (layer): default every layer.
with checkpoints as (
    select
        run_id,
        series,
        first_value(run_id) over (
            partition by series, tokens_key
            order by train_step desc, run_id
        ) as reference_run_id
    from runs
    where series is not null
        and tokens_key is not null
        and train_step is not null
        and status = 'complete'
        and (getvariable('series') is null or series = getvariable('series')::varchar)
)
select
    checkpoints.series as series,
    checkpoints.reference_run_id as reference_run_id,
    expert_load.layer as layer,
    expert_load.expert as expert,
    count(*)::bigint as checkpoints,
    min(expert_load.share) as least,
    quantile_cont(expert_load.share, 0.05) as p5,
    quantile_cont(expert_load.share, 0.5) as p50,
    quantile_cont(expert_load.share, 0.95) as p95,
    max(expert_load.share) as most,
    1::double / max(layers.num_experts) as even
from checkpoints
join expert_load
    on expert_load.run_id = checkpoints.run_id
join layers
    on layers.run_id = expert_load.run_id
    and layers.layer = expert_load.layer
where expert_load.share is not null
    and (getvariable('layer') is null or expert_load.layer = getvariable('layer'))
group by
    checkpoints.series,
    checkpoints.reference_run_id,
    expert_load.layer,
    expert_load.expert
order by series, reference_run_id, layer, expert
