-- known_texts: the text of every token equals that of its entry in the run's vocabulary.
-- One row per run, segment and token where it differs.
-- Parameters:
--   run (run): default every run.
select
    tokens.run_id as run_id,
    tokens.segment as segment,
    tokens.token_id as token_id,
    tokens.token as token,
    vocabulary.token as vocabulary_token
from tokens
left join vocabulary
    on vocabulary.run_id = tokens.run_id
    and vocabulary.vocab_id = tokens.vocab_id
where tokens.token is distinct from vocabulary.token
    and (getvariable('run') is null or tokens.run_id = getvariable('run')::varchar)
