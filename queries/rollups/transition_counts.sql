-- transition_counts: how many tokens of each kind and domain go from an expert to an expert of the next MoE layer.
-- One row per run, segment, kind, domain, layer, next layer and pair of experts that shares at least one token.
-- The next layer is the next row of layers; a token counts in all k * k' pairs of its choices at the two layers, and in
-- none if it has no rows at one of them.
-- Mergeable: counts of several segments add up. first_choice_tokens is NULL if no rank is known.
select
    here.run_id as run_id,
    here.segment as segment,
    here.kind as kind,
    here.domain as domain,
    here.layer as layer,
    there.layer as next_layer,
    here.expert as expert,
    there.expert as next_expert,
    count(*)::bigint as tokens,
    sum(case
        when here.rank = 0 and there.rank = 0 then 1
        when here.rank >= 0 and there.rank >= 0 then 0
    end)::bigint as first_choice_tokens
from routing as here
join layer_steps
    on layer_steps.run_id = here.run_id
    and layer_steps.layer = here.layer
join routing as there
    on there.run_id = here.run_id
    and there.segment = here.segment
    and there.token_id = here.token_id
    and there.layer = layer_steps.next_layer
group by
    here.run_id,
    here.segment,
    here.kind,
    here.domain,
    here.layer,
    there.layer,
    here.expert,
    there.expert
