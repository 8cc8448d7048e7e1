-- expert_token_association: the tokens associated with each expert, and how certain that is: nPMI, z, bounds of the lift.
-- One row per run, layer, expert and vocabulary entry, limited to the first rows per expert. Over tokens of kind prompt
-- and generated with rows at the layer (expert_token_affinity): N, N_x of entry x, N_i routed to expert i, N_xi both:
--   lift     = N_xi N / (N_x N_i)                   1 if independent of the token
--   npmi     = log2(lift) / log2(N / N_xi)          RICE (arXiv:2505.14681): -1 to 1, 0 if they are independent
--   expected = N_x N_i / N, z = (N_xi - expected) / its standard deviation if tokens were assigned to experts at random
--   lift_low, lift_high = 95 % confidence interval of the lift (Wilson's interval for N_xi / N_x, divided by N_i / N)
-- Ordered by lift_low, so that 12 tokens do not outrank 12 million. By chance alone, 1 in 40 independent pairs has
-- lift_low above 1.
-- Counts come from rollups, so the cost does not grow with tokens: filter on layer to read less.
-- Parameters:
--   layer (layer): default every layer.
--   expert (expert): default every expert.
--   token (token): default every token.
--   run (run): default every run.
--   most (count): maximum rows per run, layer and expert; default 20.
with counted as (
    select
        run_id,
        layer,
        expert,
        vocab_id,
        token,
        tokens,
        lift,
        round(tokens / share_of_token) as entry_tokens,
        round(tokens / share_of_expert) as expert_tokens,
        round(lift * (tokens / share_of_token) / share_of_expert) as layer_tokens
    from expert_token_affinity
    where (getvariable('layer') is null or layer = getvariable('layer'))
        and (getvariable('expert') is null or expert = getvariable('expert'))
        and (getvariable('token') is null or token = getvariable('token')::varchar)
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
shares as (
    select
        run_id,
        layer,
        expert,
        vocab_id,
        token,
        tokens,
        lift,
        entry_tokens,
        layer_tokens,
        expert_tokens / layer_tokens as expert_share,
        tokens / entry_tokens as entry_share,
        3.8416::double / entry_tokens as squared
    from counted
),
measured as (
    -- squared: 1.96^2 / N_x, from Wilson's interval
    select
        run_id,
        layer,
        expert,
        vocab_id,
        token,
        tokens,
        entry_tokens * expert_share as expected,
        lift,
        (entry_share + squared / 2 - sqrt(squared * (entry_share * (1 - entry_share) + squared / 4)))
        / (1 + squared) / expert_share as lift_low,
        (entry_share + squared / 2 + sqrt(squared * (entry_share * (1 - entry_share) + squared / 4)))
        / (1 + squared) / expert_share as lift_high,
        (tokens - entry_tokens * expert_share) / nullif(sqrt(greatest(
            entry_tokens * expert_share * (1 - expert_share) * (layer_tokens - entry_tokens)
            / nullif(layer_tokens - 1, 0),
            0
        )), 0) as z,
        log2(lift) / nullif(log2(layer_tokens / tokens), 0) as npmi
    from shares
),
ranked as (
    select
        run_id,
        layer,
        expert,
        vocab_id,
        token,
        tokens,
        expected,
        lift,
        lift_low,
        lift_high,
        z,
        npmi,
        row_number() over (partition by run_id, layer, expert order by round(lift_low, 9) desc, vocab_id asc) as place
    from measured
)
select
    run_id,
    layer,
    expert,
    vocab_id,
    token,
    tokens,
    expected,
    lift,
    lift_low,
    lift_high,
    z,
    npmi
from ranked
where place <= coalesce(getvariable('most'), 20)
order by run_id, layer, expert, place
