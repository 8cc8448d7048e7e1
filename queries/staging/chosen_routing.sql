-- chosen_routing: the rows of the tokens that a query's variables select.
-- One row per routing row of a token of kind prompt and generated that meets every given condition. No rows if only a
-- domain, only a run or nothing is given: rollups answer that without reading rows.
-- Parameters (conditions, each optional):
--   domain (domain): the domain of their prompt.
--   prompt_ids (prompt ids): such as 3,17,256; in a shell as text: '3,17,256'.
--   token (token): the token's text, spaces included.
--   token_ids (token ids): from a table: set variable token_ids = (select string_agg(token_id, ',') from mine).
--   run (run): default every run.
create or replace view chosen_routing as
with listed_parts as (
    select unnest(string_split(getvariable('token_ids')::varchar, ',')) as part
),
listed_ids as (
    select part::bigint as token_id
    from listed_parts
),
listed_prompt_parts as (
    select unnest(string_split(getvariable('prompt_ids')::varchar, ',')) as part
),
listed_prompts as (
    select part::bigint as prompt_id
    from listed_prompt_parts
),
chosen_entries as (
    select
        vocabulary_key,
        vocab_id
    from vocabulary_texts
    where token = getvariable('token')::varchar
)
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.token_id as token_id,
    routing.layer as layer,
    routing.rank as rank,
    routing.expert as expert,
    routing.weight as weight
from routing
left join chosen_entries
    on chosen_entries.vocabulary_key = routing.vocabulary_key
    and chosen_entries.vocab_id = routing.vocab_id
where routing.kind <> 'special'
    and (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
    and (getvariable('domain') is null or routing.domain = getvariable('domain')::varchar)
    and (getvariable('token') is null or chosen_entries.vocab_id is not null)
    and (
        getvariable('prompt_ids') is null
        or routing.prompt_id in (select listed_prompts.prompt_id from listed_prompts)
    )
    and (
        getvariable('token_ids') is null
        or routing.token_id in (select listed_ids.token_id from listed_ids)
    )
    and (
        getvariable('prompt_ids') is not null
        or getvariable('token') is not null
        or getvariable('token_ids') is not null
    );

comment on view chosen_routing is 'Staging. One row per routing row of a token that meets the conditions set as variables.';
comment on column chosen_routing.run_id is 'The run these rows belong to.';
comment on column chosen_routing.segment is 'The committed unit of work these rows came in.';
comment on column chosen_routing.token_id is 'prompt_id * 2^24 + position: the token''s id within its run.';
comment on column chosen_routing.layer is 'Layer index in the model.';
comment on column chosen_routing.rank is '0-based rank of this expert among the token''s choices; NULL if unknown.';
comment on column chosen_routing.expert is '0-based expert index within the layer.';
comment on column chosen_routing.weight is 'The scalar by which the model multiplied this expert''s output; NULL if unknown.';
