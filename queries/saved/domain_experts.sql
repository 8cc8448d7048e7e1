-- domain_experts: which experts each domain prefers, strongest preference first.
-- One row per run, domain, layer and expert that is chosen for at least min_share of the domain's tokens.
-- Over tokens of kind prompt and generated with rows at the layer: N_D of domain D, N_iD of them routed to expert i:
--   share         = N_iD / N_D               (OLMoE, arXiv 2409.02060, Eq. 7)
--   overall_share = N_i / N                  the same over all domains
--   lift          = share / overall_share    1 where the expert does not care about the domain
-- Parameters: run (default: every run), min_share (default 0.1).
with choices as (
    select
        run_id,
        layer,
        domain,
        expert,
        count(*) as tokens,
        sum(case when "rank" = 0 then 1 else 0 end) as first_choices
    from routes
    where kind in ('prompt', 'generated')
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    group by run_id, layer, domain, expert
),
domain_tokens as (
    select run_id, layer, domain, sum(first_choices) as tokens
    from choices
    group by run_id, layer, domain
),
expert_tokens as (
    select run_id, layer, expert, sum(tokens) as tokens
    from choices
    group by run_id, layer, expert
),
layer_tokens as (
    select run_id, layer, sum(tokens) as tokens
    from domain_tokens
    group by run_id, layer
)
select
    choices.run_id as run_id,
    choices.domain as domain,
    choices.layer as layer,
    choices.expert as expert,
    choices.tokens::bigint as tokens,
    choices.tokens::double / domain_tokens.tokens as share,
    expert_tokens.tokens::double / layer_tokens.tokens as overall_share,
    choices.tokens::double * layer_tokens.tokens / (domain_tokens.tokens::double * expert_tokens.tokens) as lift
from choices
join domain_tokens
    on domain_tokens.run_id = choices.run_id
    and domain_tokens.layer = choices.layer
    and domain_tokens.domain is not distinct from choices.domain
join expert_tokens
    on expert_tokens.run_id = choices.run_id
    and expert_tokens.layer = choices.layer
    and expert_tokens.expert = choices.expert
join layer_tokens
    on layer_tokens.run_id = choices.run_id
    and layer_tokens.layer = choices.layer
where choices.tokens::double / domain_tokens.tokens >= coalesce(getvariable('min_share'), 0.1)
order by choices.run_id, choices.domain, lift desc, choices.layer, choices.expert
