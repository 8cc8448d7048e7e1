-- domain_specialization: how much more a domain uses an expert than all domains together do.
-- One row per run, domain, layer and expert; an expert that the domain never chose has 0 tokens. NULL counts as a domain.
-- Over tokens of kind prompt and generated with rows at the layer: N_D of domain D, N_iD of them routed to expert i,
-- N and N_i the same over all domains:
--   share         = N_iD / N_D               OLMoE (arXiv:2409.02060) Eq. 7; over all experts it sums to top_k
--   overall_share = N_i / N
--   lift          = share / overall_share    1 if independent of the domain; NULL if never chosen
-- With few tokens, lift deviates from 1 by chance: its standard error is about sqrt(1 / N_iD).
create or replace view domain_specialization as
with chosen as (
    select
        expert_counts.run_id as run_id,
        expert_counts.domain as domain,
        expert_counts.layer as layer,
        expert_counts.expert as expert,
        sum(expert_counts.tokens)::bigint as tokens
    from expert_counts
    where expert_counts.kind <> 'special'
    group by
        expert_counts.run_id,
        expert_counts.domain,
        expert_counts.layer,
        expert_counts.expert
),
domain_tokens as (
    -- a token has top_k experts, so the sum of N_iD over experts is top_k N_D
    select
        chosen.run_id as run_id,
        chosen.domain as domain,
        chosen.layer as layer,
        layers.top_k as top_k,
        sum(chosen.tokens)::double / layers.top_k as tokens
    from chosen
    join layers
        on layers.run_id = chosen.run_id
        and layers.layer = chosen.layer
    group by
        chosen.run_id,
        chosen.domain,
        chosen.layer,
        layers.top_k
),
counted as (
    select
        domain_tokens.run_id as run_id,
        domain_tokens.domain as domain,
        domain_tokens.layer as layer,
        experts.expert as expert,
        coalesce(chosen.tokens, 0)::bigint as tokens,
        domain_tokens.tokens as domain_tokens,
        (sum(chosen.tokens) over (
            partition by domain_tokens.run_id, domain_tokens.layer, experts.expert
        ))::double as expert_tokens,
        (sum(chosen.tokens) over (partition by domain_tokens.run_id, domain_tokens.layer))::double
        / domain_tokens.top_k as layer_tokens
    from domain_tokens
    join experts
        on experts.run_id = domain_tokens.run_id
        and experts.layer = domain_tokens.layer
    left join chosen
        on chosen.run_id = domain_tokens.run_id
        and chosen.domain is not distinct from domain_tokens.domain
        and chosen.layer = domain_tokens.layer
        and chosen.expert = experts.expert
)
select
    run_id,
    domain,
    layer,
    expert,
    tokens,
    tokens::double / nullif(domain_tokens, 0) as share,
    coalesce(expert_tokens, 0) / nullif(layer_tokens, 0) as overall_share,
    tokens::double * layer_tokens / nullif(domain_tokens * expert_tokens, 0) as lift
from counted;

comment on view domain_specialization is 'One row per domain, layer and expert: how much of the domain goes to the expert, compared with all domains.';
comment on column domain_specialization.run_id is 'The run these rows belong to.';
comment on column domain_specialization.domain is 'Kind of data, as the input labels it; NULL counts as a domain.';
comment on column domain_specialization.layer is 'Layer index in the model.';
comment on column domain_specialization.expert is '0-based expert index within the layer.';
comment on column domain_specialization.tokens is 'N_iD: the domain''s tokens routed to this expert; 0 if none.';
comment on column domain_specialization.share is 'N_iD / N_D: share of the domain''s tokens that go to this expert; sums to top_k over experts.';
comment on column domain_specialization.overall_share is 'N_i / N: the same over all domains.';
comment on column domain_specialization.lift is 'share / overall_share: 1 if independent of the domain.';
