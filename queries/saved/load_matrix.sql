-- load_matrix: how many tokens each expert of each layer gets, in the form that expert placement tools read.
-- One row per run and layer; tokens is a JSON array with one number per expert, in order of expert. The rows of a run
-- in order of layer are the matrix (layers x experts) that DeepSeek's EPLB (github.com/deepseek-ai/EPLB) takes as
-- `weight`: torch.tensor([json.loads(row["tokens"]) for row in rows]).
-- Tokens of kind prompt and generated. Layers with different numbers of experts give rows of different lengths.
-- Parameters:
--   run (run): default every run.
select
    run_id,
    layer,
    '[' || string_agg(tokens::varchar, ', ' order by expert asc) || ']' as tokens
from expert_load
where (getvariable('run') is null or run_id = getvariable('run')::varchar)
group by
    run_id,
    layer
order by run_id, layer
