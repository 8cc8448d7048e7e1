-- expert_token_affinity: which tokens of the vocabulary go to which expert.
-- One row per run, layer, expert and vocabulary entry with at least one such token.
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_x of entry x, N_i routed to expert i,
-- N_xi both:
--   share_of_token  = N_xi / N_x             over all experts it sums to top_k
--   share_of_expert = N_xi / N_i             over all entries it sums to 1
--   lift            = N_xi * N / (N_x * N_i) 1 where the expert does not care for the token
-- Rare entries reach high lifts by chance: filter on tokens.
create or replace view expert_token_affinity as
with choices as (
    select
        routing.run_id as run_id,
        routing.layer as layer,
        routing.rank as rank,
        routing.expert as expert,
        tokens.vocab_id as vocab_id,
        tokens.token as token
    from routing
    join tokens
        on tokens.run_id = routing.run_id
        and tokens.segment = routing.segment
        and tokens.token_id = routing.token_id
    where tokens.kind in ('prompt', 'generated')
),
pair_tokens as (
    select
        run_id,
        layer,
        expert,
        vocab_id,
        min(token) as token,
        count(*)::bigint as tokens,
        sum(case when rank = 0 then 1 else 0 end)::bigint as first_choice_tokens
    from choices
    group by run_id, layer, expert, vocab_id
),
entry_tokens as (
    select
        run_id,
        layer,
        vocab_id,
        sum(first_choice_tokens)::bigint as tokens
    from pair_tokens
    group by run_id, layer, vocab_id
),
expert_tokens as (
    select
        run_id,
        layer,
        expert,
        sum(tokens)::bigint as tokens
    from pair_tokens
    group by run_id, layer, expert
),
layer_tokens as (
    select
        run_id,
        layer,
        sum(first_choice_tokens)::bigint as tokens
    from pair_tokens
    group by run_id, layer
)
select
    pair_tokens.run_id as run_id,
    pair_tokens.layer as layer,
    pair_tokens.expert as expert,
    pair_tokens.vocab_id as vocab_id,
    pair_tokens.token as token,
    pair_tokens.tokens as tokens,
    pair_tokens.tokens::double / nullif(entry_tokens.tokens, 0) as share_of_token,
    pair_tokens.tokens::double / nullif(expert_tokens.tokens, 0) as share_of_expert,
    pair_tokens.tokens::double * layer_tokens.tokens
    / nullif(entry_tokens.tokens::double * expert_tokens.tokens, 0) as lift
from pair_tokens
join entry_tokens
    on entry_tokens.run_id = pair_tokens.run_id
    and entry_tokens.layer = pair_tokens.layer
    and entry_tokens.vocab_id = pair_tokens.vocab_id
join expert_tokens
    on expert_tokens.run_id = pair_tokens.run_id
    and expert_tokens.layer = pair_tokens.layer
    and expert_tokens.expert = pair_tokens.expert
join layer_tokens
    on layer_tokens.run_id = pair_tokens.run_id
    and layer_tokens.layer = pair_tokens.layer;

comment on view expert_token_affinity is 'One row per layer, expert and vocabulary entry: how much the expert is chosen for that token.';
comment on column expert_token_affinity.run_id is 'The run these rows belong to.';
comment on column expert_token_affinity.layer is 'Layer index in the model.';
comment on column expert_token_affinity.expert is '0-based expert index within the layer.';
comment on column expert_token_affinity.vocab_id is 'The tokenizer''s id of the token.';
comment on column expert_token_affinity.token is 'The token decoded to text by itself.';
comment on column expert_token_affinity.tokens is 'N_xi: occurrences of this token routed to this expert.';
comment on column expert_token_affinity.share_of_token is 'N_xi / N_x: share of the token''s occurrences that go to this expert.';
comment on column expert_token_affinity.share_of_expert is 'N_xi / N_i: share of the expert''s tokens that are this one.';
comment on column expert_token_affinity.lift is 'N_xi * N / (N_x * N_i): 1 where the expert does not care for the token.';
