-- chosen_routing: the rows of the tokens that a query is asked about by its variables.
-- One row per routing row of a token of kind prompt and generated that meets every condition given. No rows where only
-- a domain, a run or nothing is given: rollups answer that without reading a row.
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
        run_id,
        vocab_id
    from vocabulary
    where token = getvariable('token')::varchar
)
select
    run_id,
    segment,
    token_id,
    layer,
    rank,
    expert,
    weight
from routing
where kind <> 'special'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('domain') is null or domain = getvariable('domain')::varchar)
    and (
        getvariable('token') is null
        or (run_id, vocab_id) in (select (chosen_entries.run_id, chosen_entries.vocab_id) from chosen_entries)
    )
    and (
        getvariable('prompt_ids') is null
        or prompt_id in (select listed_prompts.prompt_id from listed_prompts)
    )
    and (
        getvariable('token_ids') is null
        or token_id in (select listed_ids.token_id from listed_ids)
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
comment on column chosen_routing.rank is '0-based place of this expert among the token''s choices; NULL where unknown.';
comment on column chosen_routing.expert is '0-based expert index within the layer.';
comment on column chosen_routing.weight is 'The scalar the model multiplied this expert''s output by; NULL where unknown.';
