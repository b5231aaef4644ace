//! Walks a model's parameters by their GPT-2 names (`h.0.attn.c_attn.weight`), in the order of the model's fields.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::model::{Gpt, GptConfig};

/// Looks at every parameter.
pub trait Visit {
    /// Called once a parameter.
    fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>);
}

/// Replaces every parameter.
pub trait Map {
    /// Called once a parameter; the result must have the same shape and device.
    fn parameter<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) -> Tensor<D>;
}

/// Name and shape of every parameter of a model that need not exist, in the order in which [`visit`] comes to them.
pub fn shapes(config: &GptConfig) -> Vec<(String, Vec<usize>)> {
    let &GptConfig { n_layer, n_embd: c, block_size, vocab_size, bias, .. } = config;
    let mut shapes = vec![("wte.weight".to_string(), vec![vocab_size, c]), ("wpe.weight".into(), vec![block_size, c])];
    let mut add = |path: String, weight: Vec<usize>| {
        let outputs = weight[0];
        shapes.push((format!("{path}.weight"), weight));
        if bias {
            shapes.push((format!("{path}.bias"), vec![outputs]));
        }
    };
    for block in 0..n_layer {
        let layers = [
            ("ln_1", vec![c]),
            ("attn.c_attn", vec![3 * c, c]),
            ("attn.c_proj", vec![c, c]),
            ("ln_2", vec![c]),
            ("mlp.c_fc", vec![4 * c, c]),
            ("mlp.c_proj", vec![c, 4 * c]),
        ];
        layers.into_iter().for_each(|(layer, weight)| add(format!("h.{block}.{layer}"), weight));
    }
    add("ln_f".into(), vec![c]);
    shapes
}

/// Calls `visitor` with every parameter of `model`.
pub fn visit(model: &Gpt, visitor: &mut impl Visit) {
    model.visit(&mut Walker::new(visitor));
}

/// Calls `visitor` with every parameter of `part`, which stands at `path` in the model, such as `h.0`.
pub fn visit_part(path: &str, part: &impl Module, visitor: &mut impl Visit) {
    part.visit(&mut Walker { inner: visitor, path: vec![path.to_string()] });
}

/// `model` with every parameter replaced by what `mapper` makes of it.
pub fn map(model: Gpt, mapper: &mut impl Map) -> Gpt {
    model.map(&mut Walker::new(mapper))
}

/// Keeps the path of field names that leads to a parameter.
struct Walker<'a, T> {
    inner: &'a mut T,
    path: Vec<String>,
}

impl<'a, T> Walker<'a, T> {
    fn new(inner: &'a mut T) -> Self {
        Self { inner, path: Vec::new() }
    }
}

impl<T: Visit> ModuleVisitor for Walker<'_, T> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.inner.parameter(&self.path.join("."), &param.val());
    }
}

impl<T: Map> ModuleMapper for Walker<'_, T> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.join(".");
        param.map(|tensor| self.inner.parameter(&name, tensor))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::ops::linear::Gelu;

    struct Seen(Vec<(String, Vec<usize>)>);

    impl Visit for Seen {
        fn parameter<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
            self.0.push((name.into(), tensor.dims().to_vec()));
        }
    }

    #[test]
    fn shapes_are_those_of_a_model() {
        for bias in [false, true] {
            let config =
                GptConfig { n_layer: 2, n_head: 2, n_embd: 6, block_size: 5, vocab_size: 7, bias, gelu: Gelu::Erf };
            let mut seen = Seen(Vec::new());
            visit(&Gpt::init(&config, 1, &Device::flex()), &mut seen);
            assert_eq!(seen.0, shapes(&config));
        }
    }
}
