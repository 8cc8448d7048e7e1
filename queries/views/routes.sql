-- routes: which token went to which expert, with the token's text, kind, position and domain.
-- One row per run, token, MoE layer and chosen expert (a row of routing).
-- Tokens of every kind, specials included: filter on kind.
-- Source: the rows of routing; the text from the run's vocabulary, the position from the lower 24 bits of token_id.
-- DuckDB 2 skips the vocabulary in a query that counts or adds up rows and does not select the text.
create or replace view routes as
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.token_id as token_id,
    routing.layer as layer,
    routing.rank as rank,
    routing.expert as expert,
    routing.weight as weight,
    vocabulary_texts.token as token,
    routing.kind as kind,
    (routing.token_id & 16777215)::integer as position,
    routing.prompt_id as prompt_id,
    routing.domain as domain
from routing
left join vocabulary_texts
    on vocabulary_texts.vocabulary_key = routing.vocabulary_key
    and vocabulary_texts.vocab_id = routing.vocab_id;

comment on view routes is 'One row per routing row: which expert each token went to, with its text, kind, position and domain.';
comment on column routes.run_id is 'The run these rows belong to.';
comment on column routes.segment is 'The committed unit of work these rows came in.';
comment on column routes.token_id is 'prompt_id * 2^24 + position: the token''s id within its run.';
comment on column routes.layer is 'Layer index in the model.';
comment on column routes.rank is '0-based rank of this expert among the token''s choices, by descending weight; NULL if unknown.';
comment on column routes.expert is '0-based expert index within the layer.';
comment on column routes.weight is 'The scalar by which the model multiplied this expert''s output; NULL if unknown.';
comment on column routes.token is 'The token decoded to text by itself; NULL if unknown.';
comment on column routes.kind is 'prompt; special (added by the tokenizer); generated.';
comment on column routes.position is '0-based position in the prompt.';
comment on column routes.prompt_id is 'The prompt this token belongs to.';
comment on column routes.domain is 'Kind of data, as the input labels it; NULL counts as a domain.';
