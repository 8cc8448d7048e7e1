-- vocab_counts: how often each entry of the vocabulary has rows at each layer, and its text.
-- One row per run, segment, kind, layer and vocabulary entry that has rows at the layer. Tokens whose entry is not
-- known are left out.
-- Mergeable: counts of several segments add up.
select
    routing.run_id as run_id,
    routing.segment as segment,
    tokens.kind as kind,
    routing.layer as layer,
    tokens.vocab_id as vocab_id,
    min(tokens.token) as token,
    count(distinct routing.token_id)::bigint as tokens
from routing
join tokens
    on tokens.run_id = routing.run_id
    and tokens.segment = routing.segment
    and tokens.token_id = routing.token_id
where tokens.vocab_id is not null
group by
    routing.run_id,
    routing.segment,
    tokens.kind,
    routing.layer,
    tokens.vocab_id
