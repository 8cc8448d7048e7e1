-- layer_steps: the MoE layers, each with the next one.
-- One row per run and MoE layer (a row of layers). The next layer is the next row of layers; the last has none.
create or replace view layer_steps as
select
    run_id,
    layer,
    top_k,
    lead(layer) over (partition by run_id order by layer asc) as next_layer,
    lead(top_k) over (partition by run_id order by layer asc) as next_top_k,
    row_number() over (order by run_id asc, layer asc) as place
from layers;

comment on view layer_steps is 'Staging. One row per MoE layer, with the next one.';
comment on column layer_steps.run_id is 'The run these rows belong to.';
comment on column layer_steps.layer is 'Layer index in the model.';
comment on column layer_steps.top_k is 'Experts per token at the layer.';
comment on column layer_steps.next_layer is 'The next MoE layer; NULL at the last.';
comment on column layer_steps.next_top_k is 'Experts per token at the next MoE layer; NULL at the last.';
comment on column layer_steps.place is 'A number for each run_id and layer: grouping by it is faster than by the pair.';
