-- first_choice_paths: which paths tokens take through the layers.
-- One row per run, domain and path that some token takes. A path is a token's first choice (rank 0) at every MoE layer
-- in order, as '3-0-12-7'; over tokens of kind prompt and generated with rows at all MoE layers of the run. NULL is a
-- domain of its own.
-- With L layers of E experts there are E^L paths: an even, independent router would rarely use one twice.
-- A run whose ranks are not known (see runs.origin_format) has no first choices and no rows here. Nor has a run of an
-- encoder-decoder model with MoE layers in both, because no token passes through both.
-- Reads the rows of rank 0, so the cost grows with tokens: filter on run_id. expert_paths and expert_path_coverage
-- answer the most common questions about paths.
create or replace view first_choice_paths as
with token_paths as (
    select
        routing.run_id as run_id,
        routing.domain as domain,
        routing.token_id as token_id,
        string_agg(routing.expert::varchar, '-' order by routing.layer asc) as path,
        count(*) as layers
    from routing
    where routing.rank = 0
        and routing.kind <> 'special'
    group by
        routing.run_id,
        routing.domain,
        routing.token_id
),
depths as (
    select
        run_id,
        count(*) as layers
    from layers
    group by run_id
)
select
    token_paths.run_id as run_id,
    token_paths.domain as domain,
    token_paths.path as path,
    count(*)::bigint as tokens
from token_paths
join depths
    on depths.run_id = token_paths.run_id
    and depths.layers = token_paths.layers
group by
    token_paths.run_id,
    token_paths.domain,
    token_paths.path;

comment on view first_choice_paths is 'One row per domain and path of first choices through all MoE layers: how many tokens take it.';
comment on column first_choice_paths.run_id is 'The run these rows belong to.';
comment on column first_choice_paths.domain is 'Domain of the tokens'' prompts; NULL counts as a domain.';
comment on column first_choice_paths.path is 'First choice (rank 0) at every MoE layer, in order of layer, joined by -.';
comment on column first_choice_paths.tokens is 'Tokens of the domain that take this path.';
