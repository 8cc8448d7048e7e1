-- choice_information_of_rows: the bits that a choice shares with the position, and a first choice with the token.
-- One row per run, layer, about and choice: what choice_information leaves out, since no rollup counts it. Columns as
-- there. about position: ranges of positions in the prompt that double in length: the first, the next 2, 4, 8, ...
-- first needs ranks: a run whose ranks are not known has rows for any alone.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
select
    run_id,
    layer,
    about,
    choice,
    tokens,
    parts,
    information,
    entropy,
    normalized,
    chance
from choice_bits
where (about = 'position' or (about = 'token' and choice = 'first'))
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
order by run_id, layer, about, choice
