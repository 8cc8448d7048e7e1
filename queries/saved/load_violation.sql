-- load_violation: how far the experts of each layer are from an even load, as training logs report it.
-- One row per run and layer that has tokens. Over tokens of kind prompt and generated, with p_i the share of expert i in
-- the layer's choices (expert_load), an expert's violation is |E p_i - 1|: 0 for an even share, 1 for an expert never
-- chosen:
--   max_vio, min_vio, avg_vio = the largest, smallest and mean violation, named as in training logs (verl)
--   overload                  = max of E p_i - 1    MaxVio of loss-free balancing (arXiv:2408.15664): max load / mean - 1
-- overload is less than max_vio if the least used expert is further from even than the most used one.
-- Even routing varies by chance: with n choices, avg_vio is about sqrt(2 (E - k) / (pi n)).
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with violations as (
    select
        expert_load.run_id as run_id,
        expert_load.layer as layer,
        expert_load.share * layers.num_experts - 1 as signed_violation
    from expert_load
    join layers
        on layers.run_id = expert_load.run_id
        and layers.layer = expert_load.layer
    where expert_load.share is not null
        and (getvariable('run') is null or expert_load.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or expert_load.layer = getvariable('layer'))
)
select
    run_id,
    layer,
    max(abs(signed_violation)) as max_vio,
    min(abs(signed_violation)) as min_vio,
    avg(abs(signed_violation)) as avg_vio,
    max(signed_violation) as overload
from violations
group by
    run_id,
    layer
order by run_id, layer
