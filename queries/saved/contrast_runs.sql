-- contrast_runs: which experts one run loads more than another, largest difference first.
-- One row per layer and expert. The runs must have as many experts at the same layers. share and other_share are the
-- experts' shares of the layer's routed tokens (expert_load: each sums to 1 over the layer):
--   difference = share - other_share
--   ratio      = share / other_share, NULL if other_share is 0
-- The runs may have different prompts. For runs over the same tokens, changed_tokens shows which tokens changed experts.
-- Parameters:
--   run (run): one run.
--   other_run (run of the same experts): the other.
--   layer (layer): default every layer.
select
    here.layer as layer,
    here.expert as expert,
    here.tokens as tokens,
    there.tokens as other_tokens,
    here.share as share,
    there.share as other_share,
    here.share - there.share as difference,
    here.share / nullif(there.share, 0) as ratio
from expert_load as here
join expert_load as there
    on there.layer = here.layer
    and there.expert = here.expert
join experts_keys as here_experts
    on here_experts.run_id = here.run_id
join experts_keys as there_experts
    on there_experts.run_id = there.run_id
    and there_experts.experts_key = here_experts.experts_key
where here.run_id = getvariable('run')::varchar
    and there.run_id = getvariable('other_run')::varchar
    and (getvariable('layer') is null or here.layer = getvariable('layer'))
order by round(abs(here.share - there.share), 12) desc, layer, expert
