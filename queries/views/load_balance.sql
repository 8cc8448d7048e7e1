-- load_balance: how evenly a layer's experts are used.
-- One row per run and layer, over its E experts, unused ones included. Over tokens of kind prompt and generated with
-- rows at the layer: N_i routed to expert i, p_i = N_i / sum of N_i:
--   entropy            = - sum of p_i log2 p_i    in bits; log2 E if the load is even
--   normalized_entropy = entropy / log2 E         1 if the load is even; NULL for a single expert
--   cv                 = standard deviation of N_i (population) / mean of N_i
--   gini               = sum over experts by ascending N_i, r = 1 to E, of (2 r - E - 1) N_i / (E * sum of N_i)
--   max_over_mean      = max N_i / mean N_i       slowdown of a step that waits for the busiest expert
-- All columns except dead_experts are NULL if the layer has no tokens. An even router still varies by chance: with n
-- choices in total, cv is about sqrt((E - k) / n).
create or replace view load_balance as
with loads as (
    select
        run_id,
        layer,
        tokens,
        share,
        row_number() over (partition by run_id, layer order by tokens asc, expert asc) as place,
        count(*) over (partition by run_id, layer) as experts
    from expert_load
)
select
    run_id,
    layer,
    sum(share * log2(1 / nullif(share, 0))) as entropy,
    sum(share * log2(1 / nullif(share, 0))) / nullif(log2(count(*)::double), 0) as normalized_entropy,
    stddev_pop(tokens::double) / nullif(avg(tokens::double), 0) as cv,
    sum((2 * place - experts - 1) * tokens::double) / nullif(count(*) * sum(tokens::double), 0) as gini,
    max(tokens)::double / nullif(avg(tokens::double), 0) as max_over_mean,
    sum(case when tokens = 0 then 1 else 0 end)::bigint as dead_experts
from loads
group by
    run_id,
    layer;

comment on view load_balance is 'One row per layer: how evenly its experts are used (entropy, cv, Gini, maximum over mean, dead experts).';
comment on column load_balance.run_id is 'The run these rows belong to.';
comment on column load_balance.layer is 'Layer index in the model.';
comment on column load_balance.entropy is 'Entropy of the load in bits; log2 of the number of experts if it is even.';
comment on column load_balance.normalized_entropy is 'entropy / log2 of the number of experts: 1 if the load is even.';
comment on column load_balance.cv is 'Coefficient of variation of the experts'' tokens (population): 0 if the load is even.';
comment on column load_balance.gini is 'Gini coefficient of the experts'' tokens: 0 if the load is even, near 1 if one expert gets all.';
comment on column load_balance.max_over_mean is 'Tokens of the busiest expert over the mean.';
comment on column load_balance.dead_experts is 'Experts that no token was routed to.';
