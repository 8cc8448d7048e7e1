-- load_drift: how far the load of the experts moves from checkpoint to checkpoint.
-- One row per series, reference run, layer, checkpoint and checkpoint before it, in order of training. Checkpoints are
-- the complete runs of a series that have a train_step. Only those with an equal tokens_key and as many experts at the
-- same layers are compared: each reference run, the last checkpoint over the same tokens as in router_saturation, forms a
-- separate curve. With p and q the experts' shares of the load at a checkpoint and at the one before it (the next lower
-- train_step of the curve):
--   moved = sum over experts of |p_i - q_i| / 2    total variation: the share of choices that went elsewhere, 0 to 1
-- NULL for the first. Several runs at one train_step are never averaged: each has its rows, and the next checkpoint is
-- compared with each. cv and dead_experts as in load_balance. A constant load can hide tokens that swap experts:
-- router_saturation shows these.
-- Parameters:
--   series (series): default every series.
--   layer (layer): default every layer.
with steps as (
    select distinct
        reference_run_id,
        train_step
    from series_checkpoints
),
ordered_steps as (
    select
        reference_run_id,
        train_step,
        lag(train_step) over (partition by reference_run_id order by train_step asc) as previous_step
    from steps
),
neighbours as (
    select
        here.run_id as run_id,
        here.series as series,
        here.reference_run_id as reference_run_id,
        here.train_step as train_step,
        there.run_id as previous_run_id
    from series_checkpoints as here
    join ordered_steps
        on ordered_steps.reference_run_id = here.reference_run_id
        and ordered_steps.train_step = here.train_step
    left join series_checkpoints as there
        on there.reference_run_id = ordered_steps.reference_run_id
        and there.train_step = ordered_steps.previous_step
),
moves as (
    select
        neighbours.run_id as run_id,
        neighbours.previous_run_id as previous_run_id,
        here.layer as layer,
        sum(abs(here.share - there.share)) / 2 as moved
    from neighbours
    join expert_load as here
        on here.run_id = neighbours.run_id
    join expert_load as there
        on there.run_id = neighbours.previous_run_id
        and there.layer = here.layer
        and there.expert = here.expert
    group by
        neighbours.run_id,
        neighbours.previous_run_id,
        here.layer
)
select
    neighbours.series as series,
    neighbours.reference_run_id as reference_run_id,
    load_balance.layer as layer,
    neighbours.train_step as train_step,
    neighbours.run_id as run_id,
    neighbours.previous_run_id as previous_run_id,
    moves.moved as moved,
    load_balance.cv as cv,
    load_balance.dead_experts as dead_experts
from neighbours
join load_balance
    on load_balance.run_id = neighbours.run_id
left join moves
    on moves.run_id = neighbours.run_id
    and moves.previous_run_id = neighbours.previous_run_id
    and moves.layer = load_balance.layer
where (getvariable('layer') is null or load_balance.layer = getvariable('layer'))
order by series, reference_run_id, layer, train_step, run_id, previous_run_id
