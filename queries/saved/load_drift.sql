-- load_drift: how far the load of the experts moves from checkpoint to checkpoint.
-- One row per series, layer and checkpoint; those of equal tokens together, in order of training. Against the checkpoint
-- before it (the greatest lower train_step of equal series and tokens_key), p and q the experts' shares of the load:
--   moved = sum over experts of |p_i - q_i| / 2    total variation: the share of choices that went elsewhere, 0 to 1
-- NULL for the first. cv and dead_experts as in load_balance. A load that stands still can still hide tokens that
-- trade places: router_saturation tells.
-- Parameters: series (default: every series), layer (default: every layer).
with checkpoints as (
    select
        run_id,
        series,
        tokens_key,
        train_step,
        lag(run_id) over (partition by series, tokens_key order by train_step, run_id) as previous_run_id
    from runs
    where series is not null
        and tokens_key is not null
        and train_step is not null
        and (getvariable('series') is null or series = getvariable('series')::varchar)
),
moves as (
    select
        checkpoints.run_id as run_id,
        here.layer as layer,
        sum(abs(here.share - there.share)) / 2 as moved
    from checkpoints
    join expert_load as here
        on here.run_id = checkpoints.run_id
    join expert_load as there
        on there.run_id = checkpoints.previous_run_id
        and there.layer = here.layer
        and there.expert = here.expert
    group by
        checkpoints.run_id,
        here.layer
)
select
    checkpoints.series as series,
    load_balance.layer as layer,
    checkpoints.train_step as train_step,
    checkpoints.run_id as run_id,
    checkpoints.previous_run_id as previous_run_id,
    moves.moved as moved,
    load_balance.cv as cv,
    load_balance.dead_experts as dead_experts
from checkpoints
join load_balance
    on load_balance.run_id = checkpoints.run_id
left join moves
    on moves.run_id = load_balance.run_id
    and moves.layer = load_balance.layer
where (getvariable('layer') is null or load_balance.layer = getvariable('layer'))
order by series, checkpoints.tokens_key, layer, train_step, run_id
