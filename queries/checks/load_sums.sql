-- load_sums: a token has top_k experts and one first choice, so over all experts tokens sums to top_k times the sum of
-- first_choice_tokens (NULL, and not a fault, if ranks are not known).
-- One row per run and layer where it does not.
-- Parameters:
--   run (run): default every run.
select
    expert_load.run_id as run_id,
    expert_load.layer as layer,
    sum(expert_load.tokens)::bigint as tokens,
    (sum(expert_load.first_choice_tokens) * max(layers.top_k))::bigint as expected
from expert_load
join layers
    on layers.run_id = expert_load.run_id
    and layers.layer = expert_load.layer
where (getvariable('run') is null or expert_load.run_id = getvariable('run')::varchar)
group by
    expert_load.run_id,
    expert_load.layer
having sum(expert_load.tokens) <> sum(expert_load.first_choice_tokens) * max(layers.top_k)
order by run_id, layer
