// GELU and its derivative, exact (with the error function) or GPT-2's tanh approximation. Expects GELU_TANH (bool).

const GELU_SQRT_HALF: f32 = 0.70710678118654752;
const GELU_DENSITY: f32 = 0.39894228040143268;    // 1 / sqrt(2 pi)
const GELU_TANH_SCALE: f32 = 0.79788456080286536; // sqrt(2 / pi)
const GELU_TANH_CUBIC: f32 = 0.044715;

// The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26); exp_square is exp(-x * x).
fn error_function(x: vec4<f32>, exp_square: vec4<f32>) -> vec4<f32> {
    let t = 1.0 / (1.0 + 0.3275911 * abs(x));
    let polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return sign(x) * (1.0 - polynomial * exp_square);
}

// tanh of sqrt(2/pi) (x + 0.044715 x^3), by an exponential that cannot overflow
fn gelu_tanh(x: vec4<f32>) -> vec4<f32> {
    let argument = GELU_TANH_SCALE * x * (1.0 + GELU_TANH_CUBIC * x * x);
    let decay = exp(-2.0 * abs(argument));
    return sign(argument) * (1.0 - decay) / (1.0 + decay);
}

fn gelu(x: vec4<f32>) -> vec4<f32> {
    if (GELU_TANH) {
        return 0.5 * x * (1.0 + gelu_tanh(x));
    }
    return 0.5 * x * (1.0 + error_function(x * GELU_SQRT_HALF, exp(-0.5 * x * x)));
}

fn gelu_derivative(x: vec4<f32>) -> vec4<f32> {
    if (GELU_TANH) {
        let t = gelu_tanh(x);
        let slope = GELU_TANH_SCALE * (1.0 + 3.0 * GELU_TANH_CUBIC * x * x);
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope;
    }
    let exp_square = exp(-0.5 * x * x);
    return 0.5 * (1.0 + error_function(x * GELU_SQRT_HALF, exp_square)) + x * GELU_DENSITY * exp_square;
}
