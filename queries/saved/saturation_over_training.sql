-- saturation_over_training: how the routing settles over the checkpoints of a training run.
-- One row per series, reference run, layer and checkpoint, in order of training. Each reference run, the last checkpoint
-- over the same tokens (equal tokens_key) with as many experts, forms a separate curve, so that runs of the series over
-- other prompts, or of another model, are never mixed. Several runs at one train_step are never averaged: each has its
-- rows. Columns as in router_saturation; train_tokens as in runs.
-- Parameters:
--   series (series): default every series.
--   layer (layer): default every layer.
select
    runs.series as series,
    router_saturation.reference_run_id as reference_run_id,
    router_saturation.layer as layer,
    router_saturation.train_step as train_step,
    runs.train_tokens as train_tokens,
    router_saturation.run_id as run_id,
    router_saturation.tokens as tokens,
    router_saturation.saturation as saturation,
    router_saturation.random as random
from router_saturation
join runs
    on runs.run_id = router_saturation.run_id
where (getvariable('series') is null or runs.series = getvariable('series')::varchar)
    and (getvariable('layer') is null or router_saturation.layer = getvariable('layer'))
order by series, reference_run_id, layer, train_step, run_id
