-- token_domains: the tokens, each with the domain of its prompt.
-- One row per run and token (a row of tokens).
-- Source: the rows of tokens, joined with prompts.
create or replace view token_domains as
select
    tokens.run_id as run_id,
    tokens.segment as segment,
    tokens.token_id as token_id,
    tokens.prompt_id as prompt_id,
    tokens.position as position,
    tokens.context as context,
    tokens.vocab_id as vocab_id,
    tokens.token as token,
    tokens.kind as kind,
    prompts.domain as domain
from tokens
join prompts
    on prompts.run_id = tokens.run_id
    and prompts.segment = tokens.segment
    and prompts.prompt_id = tokens.prompt_id;

comment on view token_domains is 'Staging. One row per token, with the domain of its prompt.';
comment on column token_domains.run_id is 'The run these rows belong to.';
comment on column token_domains.segment is 'The committed unit of work these rows came in.';
comment on column token_domains.token_id is 'prompt_id * 2^24 + position: the token''s id within its run.';
comment on column token_domains.prompt_id is 'The prompt this token belongs to.';
comment on column token_domains.position is '0-based position in the prompt; continues across chunks.';
comment on column token_domains.context is '0-based chunk: tokens attend only within their own context.';
comment on column token_domains.vocab_id is 'The tokenizer''s id of this token.';
comment on column token_domains.token is 'The token decoded to text by itself.';
comment on column token_domains.kind is 'prompt; special (added by the tokenizer); generated.';
comment on column token_domains.domain is 'Kind of data, as the input labels it; NULL counts as a domain.';
