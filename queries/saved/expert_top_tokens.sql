-- expert_top_tokens: the tokens an expert is chosen for, highest lift first.
-- One row per run and token of the vocabulary that is routed to the expert at least min_tokens times.
--   share_of_token = N_xi / N_x              how often this token goes to the expert
--   lift           = N_xi * N / (N_x * N_i)  1 if independent of the token
-- Parameters:
--   layer (layer): the expert's layer.
--   expert (expert): the expert.
--   run (run): default every run.
--   min_tokens (count): default 10; rarer tokens have a high lift by chance.
select
    run_id,
    vocab_id,
    token,
    tokens,
    share_of_token,
    lift
from expert_token_affinity
where layer = getvariable('layer')
    and expert = getvariable('expert')
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and tokens >= coalesce(getvariable('min_tokens'), 10)
order by run_id, lift desc, tokens desc, vocab_id
