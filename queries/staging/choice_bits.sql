-- choice_bits: the information, in bits, that a choice of expert shares with the token, the domain or the position.
-- One row per run, layer, about and choice (as in choice_cells) with tokens. Of n choices, n_gi are of expert i in part g:
--   information = sum of n_gi / n * log2(n_gi n / (n_g n_i)), entropy = - sum of n_i / n * log2(n_i / n)
--   chance      = (I - c) (G - 1) / (2 n ln 2), with I experts and G parts that occur, c counted choices per token
-- c = 1 gives Miller's (1955) correction. A token's k choices are distinct, which reduces the chance information.
create or replace view choice_bits as
with counted as (
    select
        run_id,
        layer,
        about,
        choice,
        part,
        expert,
        tokens::double as choices,
        (sum(tokens) over (partition by run_id, layer, about, choice, part))::double as part_choices,
        (sum(tokens) over (partition by run_id, layer, about, choice, expert))::double as expert_choices,
        (sum(tokens) over (partition by run_id, layer, about, choice))::double as all_choices
    from choice_cells
),
measured as (
    select
        run_id,
        layer,
        about,
        choice,
        max(all_choices) as choices,
        count(distinct part) as parts,
        count(distinct expert) as experts,
        sum(choices / all_choices * log2(choices * all_choices / (part_choices * expert_choices))) as information,
        sum(choices / all_choices * log2(all_choices / expert_choices)) as entropy
    from counted
    group by
        run_id,
        layer,
        about,
        choice
)
select
    measured.run_id as run_id,
    measured.layer as layer,
    measured.about as about,
    measured.choice as choice,
    round(measured.choices / case when measured.choice = 'any' then layers.top_k else 1 end)::bigint as tokens,
    measured.parts as parts,
    measured.information as information,
    measured.entropy as entropy,
    greatest(measured.experts - case when measured.choice = 'any' then layers.top_k else 1 end, 0)::double
    * (measured.parts - 1) / (2 * measured.choices * ln(2)) as chance
from measured
join layers
    on layers.run_id = measured.run_id
    and layers.layer = measured.layer;

comment on view choice_bits is 'Staging. One row per layer, about and choice: bits that a choice of expert shares with the token, domain or position.';
comment on column choice_bits.run_id is 'The run these rows belong to.';
comment on column choice_bits.layer is 'Layer index in the model.';
comment on column choice_bits.about is 'token, domain or position.';
comment on column choice_bits.choice is 'any: all k choices of a token; first: rank 0.';
comment on column choice_bits.tokens is 'Tokens whose choices are counted.';
comment on column choice_bits.parts is 'Tokens of the vocabulary, domains or ranges of positions that occur.';
comment on column choice_bits.information is 'Mutual information of the expert and the part, in bits.';
comment on column choice_bits.entropy is 'Entropy of the expert alone, in bits: information never exceeds it.';
comment on column choice_bits.chance is 'Expected information of independent choices, in bits.';
