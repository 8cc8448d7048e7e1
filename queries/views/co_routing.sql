-- co_routing: which experts of a layer are chosen together.
-- One row per run, layer and ordered pair of different experts that share a token (both orders).
-- Over tokens of kind prompt and generated with rows at the layer: N of them, N_a routed to expert_a, N_ab to both:
--   conditional = N_ab / N_a                 OLMoE (arXiv:2409.02060) Eq. 6; over all expert_b it sums to top_k - 1
--   jaccard     = N_ab / (N_a + N_b - N_ab)
--   lift        = N_ab * N / (N_a * N_b)     1 if the two are chosen independently
-- A pair that never shares a token has no row: its three ratios are 0. A run that was imported as counts only has no rows.
-- Counts come from the rollups pair_counts and expert_counts, so the cost does not grow with tokens.
create or replace view co_routing as
select
    run_id,
    layer,
    expert_a,
    expert_b,
    tokens,
    tokens::double / tokens_a as conditional,
    tokens::double / (tokens_a + tokens_b - tokens) as jaccard,
    tokens::double * tokens_all / (tokens_a * tokens_b) as lift
from pair_totals;

comment on view co_routing is 'One row per layer and ordered pair of experts chosen together: how often, compared with chance.';
comment on column co_routing.run_id is 'The run these rows belong to.';
comment on column co_routing.layer is 'Layer index in the model.';
comment on column co_routing.expert_a is 'The expert that conditional conditions on.';
comment on column co_routing.expert_b is 'Another expert of the same layer.';
comment on column co_routing.tokens is 'N_ab: tokens routed to both.';
comment on column co_routing.conditional is 'N_ab / N_a: share of expert_a''s tokens that also go to expert_b.';
comment on column co_routing.jaccard is 'N_ab / (N_a + N_b - N_ab): share of either''s tokens that go to both.';
comment on column co_routing.lift is 'N_ab * N / (N_a * N_b): 1 if the two are chosen independently.';
