-- token_experts: the experts of a token of the vocabulary, most used first.
-- One row per run, layer, expert and vocabulary entry whose text is the token.
--   share_of_token = N_xi / N_x              how often this token goes to the expert
--   lift           = N_xi * N / (N_x * N_i)  1 if independent of the token
-- Parameters:
--   token (token): the token's text, spaces included.
--   run (run): default every run.
--   layer (layer): default every layer.
select
    run_id,
    layer,
    expert,
    vocab_id,
    tokens,
    share_of_token,
    lift
from expert_token_affinity
where token = getvariable('token')::varchar
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
order by run_id, layer, vocab_id, tokens desc, expert
