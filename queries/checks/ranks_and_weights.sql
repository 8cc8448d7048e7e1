-- ranks_and_weights: ranks are 0 to k - 1, each once, by descending weight; ties by expert; no expert twice. A token's
-- ranks at a layer are all known or all NULL; if weights are known, so are ranks.
-- One row per run, segment, layer, token and choice that violates this, with the choice before it.
-- Parameters:
--   run (run): default every run.
with ordered_choices as (
    select
        run_id,
        segment,
        layer,
        token_id,
        rank as choice,
        expert,
        weight,
        (row_number() over (partition by run_id, segment, layer, token_id order by rank asc, expert asc) - 1)::integer as place,
        lag(rank) over (partition by run_id, segment, layer, token_id order by rank asc, expert asc) as previous_choice,
        lag(expert) over (partition by run_id, segment, layer, token_id order by rank asc, expert asc) as previous_expert,
        lag(weight) over (partition by run_id, segment, layer, token_id order by rank asc, expert asc) as previous_weight
    from routing
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
)
select
    run_id,
    segment,
    layer,
    token_id,
    choice,
    place,
    expert,
    previous_expert,
    weight,
    previous_weight
from ordered_choices
where choice <> place
    or weight > previous_weight
    or (weight = previous_weight and expert <= previous_expert)
    or expert = previous_expert
    or (choice is null and (previous_choice is not null or weight is not null))
    or (choice is not null and place > 0 and previous_choice is null)
order by run_id, segment, layer, token_id, choice
