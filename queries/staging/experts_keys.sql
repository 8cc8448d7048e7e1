-- experts_keys: which runs may be compared expert by expert: those with as many experts at the same layers.
-- One row per run. Between models with other MoE layers or numbers of experts, equal indices mean nothing.
create or replace view experts_keys as
select
    run_id,
    string_agg(layer::varchar || ':' || num_experts::varchar, ',' order by layer asc) as experts_key
from layers
group by run_id;

comment on view experts_keys is 'Staging. One row per run: which runs may be compared expert by expert.';
comment on column experts_keys.run_id is 'The run these rows belong to.';
comment on column experts_keys.experts_key is 'Runs with an equal key have as many experts at the same layers.';
