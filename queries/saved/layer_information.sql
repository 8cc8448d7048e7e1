-- layer_information: how well a token's first choice at a layer predicts its first choice at the next MoE layer.
-- One row per run, layer and next layer. Over the N tokens of kind prompt and generated routed at both, with p the shares
-- of their first choices (rank 0):
--   mutual_information = sum over pairs of p_ij log2(p_ij / (p_i p_j))    bits; 0 if the two are independent
--   entropy, next_entropy = - sum of p log2 p of each layer alone         bits; upper bounds of mutual_information
--   normalized         = mutual_information / the lower entropy           1: one determines the other
--   chance             = (I - 1) (J - 1) / (2 N ln 2)                     expected bits of independent choices
-- with I and J the experts that are some token's first choice at each layer. chance is the first-order correction of
-- Miller (1955) and Madow for an entropy estimated from N samples, applied to mutual information.
-- A run whose ranks are not known has no first choices and no rows here.
-- Counts come from first_choice_transitions, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
with pairs_of as (
    select
        run_id,
        layer,
        next_layer,
        expert,
        next_expert,
        tokens,
        sum(tokens) over (partition by run_id, layer) as tokens_all,
        lift
    from first_choice_transitions
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
information as (
    select
        run_id,
        layer,
        next_layer,
        sum(tokens)::bigint as tokens,
        sum(tokens::double / tokens_all * log2(lift)) as mutual_information
    from pairs_of
    group by
        run_id,
        layer,
        next_layer
),
here_tokens as (
    select
        run_id,
        layer,
        expert,
        sum(tokens)::double / max(tokens_all) as share
    from pairs_of
    group by
        run_id,
        layer,
        expert
),
there_tokens as (
    select
        run_id,
        layer,
        next_expert,
        sum(tokens)::double / max(tokens_all) as share
    from pairs_of
    group by
        run_id,
        layer,
        next_expert
),
here_entropy as (
    select
        run_id,
        layer,
        sum(share * log2(1 / share)) as entropy,
        count(*) as experts
    from here_tokens
    group by
        run_id,
        layer
),
there_entropy as (
    select
        run_id,
        layer,
        sum(share * log2(1 / share)) as entropy,
        count(*) as experts
    from there_tokens
    group by
        run_id,
        layer
)
select
    information.run_id as run_id,
    information.layer as layer,
    information.next_layer as next_layer,
    information.tokens as tokens,
    information.mutual_information as mutual_information,
    here_entropy.entropy as entropy,
    there_entropy.entropy as next_entropy,
    information.mutual_information / nullif(least(here_entropy.entropy, there_entropy.entropy), 0) as normalized,
    ((here_entropy.experts - 1) * (there_entropy.experts - 1))::double / (2 * information.tokens * ln(2)) as chance
from information
join here_entropy
    on here_entropy.run_id = information.run_id
    and here_entropy.layer = information.layer
join there_entropy
    on there_entropy.run_id = information.run_id
    and there_entropy.layer = information.layer
order by run_id, layer
