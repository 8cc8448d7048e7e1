-- position_information: how many bits a token's choice of experts shares with its position in the prompt.
-- One row per run and layer. Columns as in choice_information; the parts are ranges of positions that double in length:
-- the first position, the next 2, 4, 8, ... The positions of a decoder's tokens follow its encoder's, so in an
-- encoder-decoder model they depend on the length of the encoder's text.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
select
    run_id,
    layer,
    max(case when about = 'position' then tokens end) as tokens,
    max(case when about = 'position' then entropy end) as entropy,
    max(case when about = 'position' then parts end) as ranges,
    max(case when about = 'position' then information end) as position_information,
    max(case when about = 'position' then chance end) as position_chance
from choice_bits
where choice = 'any'
    and about = 'position'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
group by
    run_id,
    layer
order by run_id, layer
