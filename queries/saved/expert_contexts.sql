-- expert_contexts: the text around the tokens that an expert is used for, largest weight first.
-- One row per run and token routed to the expert at the layer, largest weight first. before and after are the texts of
-- the tokens next to it in the same prompt and context, width tokens on each side.
-- Tokens of kind prompt and generated; runs may have different scales of weights, so each run is ranked separately.
-- A run without weights is ordered by token_id; choice and weight are NULL if not known.
-- Parameters:
--   layer (layer): the expert's layer.
--   expert (expert): the expert.
--   run (run): default every run.
--   strongest (count): maximum rows per run; default 20.
--   width (count): tokens shown on each side; default 10.
with ranked as (
    select
        run_id,
        segment,
        token_id,
        rank as choice,
        weight,
        domain,
        row_number() over (partition by run_id order by weight desc nulls last, token_id asc) as place
    from routing
    where layer = getvariable('layer')
        and expert = getvariable('expert')
        and kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
strongest as (
    select
        ranked.run_id as run_id,
        ranked.segment as segment,
        ranked.token_id as token_id,
        ranked.choice as choice,
        ranked.weight as weight,
        ranked.domain as domain,
        ranked.place as place,
        tokens.prompt_id as prompt_id,
        tokens.position as position,
        tokens.context as context,
        tokens.token as token
    from ranked
    join tokens
        on tokens.run_id = ranked.run_id
        and tokens.segment = ranked.segment
        and tokens.token_id = ranked.token_id
    where ranked.place <= coalesce(getvariable('strongest'), 20)
),
around as (
    select
        strongest.run_id as run_id,
        strongest.token_id as token_id,
        string_agg(case when near.position < strongest.position then near.token else '' end, '' order by near.position asc) as before,
        string_agg(case when near.position > strongest.position then near.token else '' end, '' order by near.position asc) as after
    from strongest
    join tokens as near
        on near.run_id = strongest.run_id
        and near.segment = strongest.segment
        and near.prompt_id = strongest.prompt_id
        and near.context = strongest.context
        and strongest.position - near.position <= coalesce(getvariable('width'), 10)
        and near.position - strongest.position <= coalesce(getvariable('width'), 10)
    where near.kind <> 'special'
    group by
        strongest.run_id,
        strongest.token_id
)
select
    strongest.run_id as run_id,
    strongest.token_id as token_id,
    strongest.domain as domain,
    strongest.choice as choice,
    strongest.weight as weight,
    around.before as before,
    strongest.token as token,
    around.after as after
from strongest
join around
    on around.run_id = strongest.run_id
    and around.token_id = strongest.token_id
order by strongest.run_id, strongest.place
