-- expert_contexts: where an expert is used most: the text around its tokens, strongest weight first.
-- One row per run and token routed to the expert at the layer, the strongest first. before and after are the texts of
-- the tokens next to it in the same prompt and context, width of them on each side.
-- Tokens of kind prompt and generated; the weights of different runs are not on one scale, so each run is ranked alone.
-- A run without weights is in order of token_id; choice and weight are NULL where they are not known.
-- Parameters:
--   layer (layer): the expert's layer.
--   expert (expert): the expert.
--   run (run): default every run.
--   strongest (count): rows per run at most; default 20.
--   width (count): tokens shown on each side; default 10.
with ranked as (
    select
        routing.run_id as run_id,
        routing.segment as segment,
        routing.token_id as token_id,
        routing.rank as choice,
        routing.weight as weight,
        tokens.prompt_id as prompt_id,
        tokens.position as position,
        tokens.context as context,
        tokens.token as token,
        row_number() over (
            partition by routing.run_id
            order by routing.weight desc nulls last, routing.token_id
        ) as place
    from routing
    join tokens
        on tokens.run_id = routing.run_id
        and tokens.segment = routing.segment
        and tokens.token_id = routing.token_id
    where routing.layer = getvariable('layer')
        and routing.expert = getvariable('expert')
        and tokens.kind <> 'special'
        and (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
),
strongest as (
    select
        run_id,
        segment,
        token_id,
        choice,
        weight,
        prompt_id,
        position,
        context,
        token,
        place
    from ranked
    where place <= coalesce(getvariable('strongest'), 20)
),
around as (
    select
        strongest.run_id as run_id,
        strongest.token_id as token_id,
        string_agg(case when near.position < strongest.position then near.token else '' end, '' order by near.position) as before,
        string_agg(case when near.position > strongest.position then near.token else '' end, '' order by near.position) as after
    from strongest
    join tokens as near
        on near.run_id = strongest.run_id
        and near.segment = strongest.segment
        and near.prompt_id = strongest.prompt_id
        and near.context = strongest.context
        and near.position >= strongest.position - coalesce(getvariable('width'), 10)
        and near.position <= strongest.position + coalesce(getvariable('width'), 10)
    where near.kind <> 'special'
    group by
        strongest.run_id,
        strongest.token_id
)
select
    strongest.run_id as run_id,
    strongest.token_id as token_id,
    prompts.domain as domain,
    strongest.choice as choice,
    strongest.weight as weight,
    around.before as before,
    strongest.token as token,
    around.after as after
from strongest
join around
    on around.run_id = strongest.run_id
    and around.token_id = strongest.token_id
join prompts
    on prompts.run_id = strongest.run_id
    and prompts.segment = strongest.segment
    and prompts.prompt_id = strongest.prompt_id
order by strongest.run_id, strongest.place
