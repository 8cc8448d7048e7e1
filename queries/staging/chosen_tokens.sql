-- chosen_tokens: the tokens that a query is asked about by its variables.
-- One row per run and token of kind prompt and generated that meets every condition given. No rows where only a
-- domain, a run or nothing is given: rollups answer that without reading a row.
-- Parameters (conditions, each optional):
--   domain (domain): the domain of their prompt.
--   prompt_ids (prompt ids): such as 3,17,256; in a shell as text: '3,17,256'.
--   token (token): the token's text, spaces included.
--   token_ids (token ids): from a table: set variable token_ids = (select string_agg(token_id, ',') from mine).
--   run (run): default every run.
create or replace view chosen_tokens as
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
)
select
    run_id,
    segment,
    token_id
from token_domains
where kind <> 'special'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('domain') is null or domain = getvariable('domain')::varchar)
    and (getvariable('token') is null or token = getvariable('token')::varchar)
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

comment on view chosen_tokens is 'Staging. One row per token that meets the conditions set as variables.';
comment on column chosen_tokens.run_id is 'The run these rows belong to.';
comment on column chosen_tokens.segment is 'The committed unit of work these rows came in.';
comment on column chosen_tokens.token_id is 'prompt_id * 2^24 + position: the token''s id within its run.';
