-- choice_information: how many bits a token's choice of experts shares with the token itself and with its domain.
-- One row per run and layer. Over tokens of kind prompt and generated with rows at the layer, all k experts of a token
-- counted equally: of n = k N choices, n_gi are of expert i in part g (a vocabulary entry, or a domain, including NULL):
--   token_information, domain_information = sum of n_gi / n * log2(n_gi n / (n_g n_i))    bits: 0 if the choice does not
--                                           depend on it
--   token_chance, domain_chance           = (I - k) (G - 1) / (2 n ln 2)    expected bits of independent choices, with G
--                                           parts (entries, domains) and I experts that occur
--   entropy                               = - sum of n_i / n * log2(n_i / n)    upper bound of both
-- OpenMoE (arXiv:2402.01739) calls routing by the token context-independent; this measures it in bits. Subtract chance
-- before comparing layers or corpora; with many rare entries, chance is most of the information. Tokens whose entry is
-- not known are left out of the token's columns.
-- Counts come from rollups, so the cost does not grow with tokens. first_choice_information does the same for first
-- choices, position_information for positions.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with merged_runs as (
    -- sealed, with one kind of token besides specials: affinity_counts has one row per key already
    select run_id
    from expert_counts
    where kind <> 'special'
        and segment is null
    group by
        run_id
    having min(kind) = max(kind)
),
cells as (
    -- n_gi: of entry g and expert i
    select
        run_id,
        layer,
        expert,
        tokens::double as choices
    from affinity_counts
    where kind <> 'special'
        and vocab_id is not null
        and segment is null
        and run_id in (select merged_runs.run_id from merged_runs)
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    union all
    select
        run_id,
        layer,
        expert,
        sum(tokens)::double as choices
    from affinity_counts
    where kind <> 'special'
        and vocab_id is not null
        and run_id not in (select merged_runs.run_id from merged_runs)
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        layer,
        expert,
        vocab_id
),
expert_sums as (
    select
        run_id,
        layer,
        expert,
        sum(choices) as choices,
        sum(choices * log2(choices)) as cell_bits
    from cells
    group by
        run_id,
        layer,
        expert
),
entry_sums as (
    -- a token has top_k experts, so the sum of n_gi over experts is top_k N_g
    select
        vocab_counts.run_id as run_id,
        vocab_counts.layer as layer,
        vocab_counts.vocab_id as vocab_id,
        sum(vocab_counts.tokens)::double * max(layers.top_k) as choices
    from vocab_counts
    join layers
        on layers.run_id = vocab_counts.run_id
        and layers.layer = vocab_counts.layer
    where vocab_counts.kind <> 'special'
        and vocab_counts.vocab_id is not null
        and (getvariable('run') is null or vocab_counts.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or vocab_counts.layer = getvariable('layer'))
    group by
        vocab_counts.run_id,
        vocab_counts.layer,
        vocab_counts.vocab_id
),
of_experts as (
    select
        run_id,
        layer,
        sum(choices) as choices,
        count(*)::bigint as experts,
        sum(cell_bits) as cell_bits,
        sum(choices * log2(choices)) as expert_bits
    from expert_sums
    group by
        run_id,
        layer
),
of_entries as (
    select
        run_id,
        layer,
        count(*)::bigint as entries,
        sum(choices * log2(choices)) as entry_bits
    from entry_sums
    group by
        run_id,
        layer
),
of_tokens as (
    -- sum of n_gi log2(n_gi n / (n_g n_i)), expanded so that no cell needs the sums of its entry and its expert
    select
        of_experts.run_id as run_id,
        of_experts.layer as layer,
        of_entries.entries as entries,
        greatest(
            (of_experts.cell_bits - of_entries.entry_bits - of_experts.expert_bits) / of_experts.choices
            + log2(of_experts.choices),
            0::double
        ) as information,
        greatest(of_experts.experts - layers.top_k, 0)::double * (of_entries.entries - 1)
        / (2 * of_experts.choices * ln(2)) as chance
    from of_experts
    join of_entries
        on of_entries.run_id = of_experts.run_id
        and of_entries.layer = of_experts.layer
    join layers
        on layers.run_id = of_experts.run_id
        and layers.layer = of_experts.layer
)
select
    choice_bits.run_id as run_id,
    choice_bits.layer as layer,
    choice_bits.tokens as tokens,
    choice_bits.entropy as entropy,
    of_tokens.entries as entries,
    of_tokens.information as token_information,
    of_tokens.chance as token_chance,
    choice_bits.parts as domains,
    choice_bits.information as domain_information,
    choice_bits.chance as domain_chance
from choice_bits
left join of_tokens
    on of_tokens.run_id = choice_bits.run_id
    and of_tokens.layer = choice_bits.layer
where choice_bits.choice = 'any'
    and choice_bits.about = 'domain'
    and (getvariable('run') is null or choice_bits.run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or choice_bits.layer = getvariable('layer'))
order by run_id, layer
