-- choice_information: how many bits a token's choice of experts shares with the token itself and with its domain.
-- One row per run and layer. Over tokens of kind prompt and generated with rows at the layer, all k experts of a token
-- counted alike: of n = k N choices, n_gi in part g (an entry of the vocabulary; a domain, NULL is one) and of expert i:
--   token_information, domain_information = sum of n_gi / n * log2(n_gi n / (n_g n_i))    bits: 0 where the choice does
--                                           not depend on it
--   token_chance, domain_chance           = (I - k) (G - 1) / (2 n ln 2)    bits that independent choices show by chance,
--                                           with G parts (entries, domains) and I experts that occur
--   entropy                               = - sum of n_i / n * log2(n_i / n)    neither information exceeds it
-- OpenMoE (arXiv:2402.01739) calls it context-independence that experts follow the token: here in bits. Subtract chance
-- before you compare layers or corpora; where many entries are rare, it is most of the information. Tokens whose entry is
-- not known are left out of the token's columns.
-- Counts come from rollups, so the cost does not grow with tokens. first_choice_information has the same of first choices,
-- position_information of positions.
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
    max(case when about = 'domain' then chance end) as domain_chance
from choice_bits
where choice = 'any'
    and about <> 'position'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
group by
    run_id,
    layer
order by run_id, layer
