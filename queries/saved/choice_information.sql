-- choice_information: how many bits a token's choice of experts shares with the token itself and with its domain.
-- One row per run, layer, about (token: the vocabulary entry; domain: NULL is one of its own) and choice: any counts all k
-- experts of a token alike, first those of rank 0 (about domain only, and where ranks are known). Of n choices of tokens
-- of kind prompt and generated, n_gi in part g (an entry, a domain) and of expert i:
--   information = sum of n_gi / n * log2(n_gi n / (n_g n_i))    bits: 0 where the choice does not depend on it
--   entropy     = - sum of n_i / n * log2(n_i / n)              never exceeded
--   normalized  = information / entropy                         1 where it decides the choice (for k = 1)
--   chance      = (I - k) (G - 1) / (2 n ln 2) for any, (I - 1) (G - 1) / (2 n ln 2) for first    bits that independent
--                 choices show by chance, with G parts and I experts that occur
-- OpenMoE (arXiv:2402.01739) calls it context-independence that experts follow the token: here in bits. Subtract chance
-- before you compare layers or corpora; where many entries are rare, it is most of the information.
-- Counts come from rollups, so the cost does not grow with tokens. choice_information_of_rows has the rest.
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
where (about = 'domain' or (about = 'token' and choice = 'any'))
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
order by run_id, layer, about, choice
