-- expert_reuse: how many of a token's experts the token before it also used.
-- One row per run, domain and layer with adjacent tokens: positions p and p + 1 of one prompt and context, both of kind
-- prompt or generated, both with rows at the layer, S_p and S_(p+1) their sets of k experts. NULL counts as a domain:
--   reuse         = mean of |S_p and S_(p+1) in common| / k     share of experts that need not be loaded again
--   jaccard       = mean of |in common| / |in either|
--   reuse_by_load = sum over experts of (N_iD / N_D)^2 / k      reuse of independent tokens with this load
--   random        = k / E                                       the same for an even load
-- expert_repetition counts the pairs that share any expert, or the first choice.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with context_starts as (
    select
        run_id,
        segment,
        min(token_id) as token_id
    from tokens
    where context > 0
    group by
        run_id,
        segment,
        prompt_id,
        context
),
common as (
    select
        here.run_id as run_id,
        here.domain as domain,
        here.layer as layer,
        here.token_id as token_id,
        count(*)::double as shared
    from routing as here
    join routing as there
        on there.run_id = here.run_id
        and there.segment = here.segment
        and there.layer = here.layer
        and there.expert = here.expert
        and there.prompt_id = here.prompt_id
        and there.token_id = here.token_id + 1
    left join context_starts
        on context_starts.run_id = there.run_id
        and context_starts.segment = there.segment
        and context_starts.token_id = there.token_id
    where here.kind <> 'special'
        and there.kind <> 'special'
        and context_starts.token_id is null
        and (getvariable('run') is null or here.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or here.layer = getvariable('layer'))
    group by
        here.run_id,
        here.domain,
        here.layer,
        here.token_id
),
common_sums as (
    select
        common.run_id as run_id,
        common.domain as domain,
        common.layer as layer,
        sum(common.shared) as shared,
        sum(common.shared / (2 * layers.top_k - common.shared)) as jaccards
    from common
    join layers
        on layers.run_id = common.run_id
        and layers.layer = common.layer
    group by
        common.run_id,
        common.domain,
        common.layer
),
loads as (
    select
        run_id,
        domain,
        layer,
        expert,
        sum(tokens)::double as tokens
    from expert_counts
    where kind <> 'special'
    group by
        run_id,
        domain,
        layer,
        expert
),
load_sums as (
    select
        run_id,
        domain,
        layer,
        sum(tokens * tokens) as squares,
        sum(tokens) as choices
    from loads
    group by
        run_id,
        domain,
        layer
)
select
    expert_repetition.run_id as run_id,
    expert_repetition.domain as domain,
    expert_repetition.layer as layer,
    expert_repetition.pairs as pairs,
    coalesce(common_sums.shared, 0) / (layers.top_k * expert_repetition.pairs) as reuse,
    coalesce(common_sums.jaccards, 0) / expert_repetition.pairs as jaccard,
    load_sums.squares * layers.top_k / (load_sums.choices * load_sums.choices) as reuse_by_load,
    layers.top_k::double / layers.num_experts as random
from expert_repetition
join layers
    on layers.run_id = expert_repetition.run_id
    and layers.layer = expert_repetition.layer
join load_sums
    on load_sums.run_id = expert_repetition.run_id
    and load_sums.domain is not distinct from expert_repetition.domain
    and load_sums.layer = expert_repetition.layer
left join common_sums
    on common_sums.run_id = expert_repetition.run_id
    and common_sums.domain is not distinct from expert_repetition.domain
    and common_sums.layer = expert_repetition.layer
where expert_repetition.pairs > 0
    and (getvariable('run') is null or expert_repetition.run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or expert_repetition.layer = getvariable('layer'))
order by run_id, domain, layer
