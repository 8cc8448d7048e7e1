-- first_choice_information: how many bits a token's first choice shares with the token, its domain and its position.
-- One row per run and layer. Columns as in choice_information and position_information, over choices of rank 0 only: n = N,
-- and chance = (I - 1) (G - 1) / (2 n ln 2), Miller's (1955) correction.
-- A run whose ranks are not known has no first choices and no rows here.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
select
    run_id,
    layer,
    max(case when about = 'domain' then tokens end) as tokens,
    max(case when about = 'domain' then entropy end) as entropy,
    max(case when about = 'token' then parts end) as entries,
    max(case when about = 'token' then information end) as token_information,
    max(case when about = 'token' then chance end) as token_chance,
    max(case when about = 'domain' then parts end) as domains,
    max(case when about = 'domain' then information end) as domain_information,
    max(case when about = 'domain' then chance end) as domain_chance,
    max(case when about = 'position' then parts end) as ranges,
    max(case when about = 'position' then information end) as position_information,
    max(case when about = 'position' then chance end) as position_chance
from choice_bits
where choice = 'first'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
group by
    run_id,
    layer
order by run_id, layer
