//! Walks a model's parameters by their GPT-2 names (`h.0.attn.c_attn.weight`), in the order of the model's fields.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::model::Gpt;

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
