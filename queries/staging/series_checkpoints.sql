-- series_checkpoints: the checkpoints of each series that can be compared, each with the last of them.
-- One row per complete run of a series that has a train_step. Those with an equal tokens_key and as many experts at the
-- same layers belong together: their reference run is the last one (the first by run_id if there are several).
-- Parameters:
--   series (series): default every series.
create or replace view series_checkpoints as
select
    runs.run_id as run_id,
    runs.series as series,
    runs.train_step as train_step,
    first_value(runs.run_id) over (
        partition by runs.series, runs.tokens_key, experts_keys.experts_key
        order by runs.train_step desc, runs.run_id asc
    ) as reference_run_id
from runs
join experts_keys
    on experts_keys.run_id = runs.run_id
where runs.series is not null
    and runs.tokens_key is not null
    and runs.train_step is not null
    and runs.status = 'complete'
    and (getvariable('series') is null or runs.series = getvariable('series')::varchar);

comment on view series_checkpoints is 'Staging. One row per complete run of a series with a training step: the last checkpoint it is compared with.';
comment on column series_checkpoints.run_id is 'The run these rows belong to: a checkpoint.';
comment on column series_checkpoints.series is 'Checkpoints of one training run share a series.';
comment on column series_checkpoints.train_step is 'Training step of the checkpoint.';
comment on column series_checkpoints.reference_run_id is 'The last checkpoint over the same tokens with as many experts.';
