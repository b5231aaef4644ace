// GELU and its derivative, exact (with the error function) or GPT-2's tanh approximation. Expects GELU_TANH (bool).

const GELU_DENSITY: f32 = 0.39894228040143268;    // 1 / sqrt(2 pi)
const GELU_TANH_SCALE: f32 = 0.79788456080286536; // sqrt(2 / pi)
const GELU_TANH_CUBIC: f32 = 0.044715;

// The normal distribution's tail, the probability of more than u >= 0, to 1e-7: by the error function of Abramowitz and Stegun, 7.1.26.
// exp_square is exp(-u * u / 2).
fn normal_tail(u: vec4<f32>, exp_square: vec4<f32>) -> vec4<f32> {
    let t = 1.0 / (1.0 + 0.23164189 * u);
    return exp_square * t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))));
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
    let u = abs(x);
    return max(x, vec4<f32>()) - u * normal_tail(u, exp(-0.5 * x * x));
}

fn gelu_derivative(x: vec4<f32>) -> vec4<f32> {
    if (GELU_TANH) {
        let t = gelu_tanh(x);
        let slope = GELU_TANH_SCALE * (1.0 + 3.0 * GELU_TANH_CUBIC * x * x);
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope;
    }
    let exp_square = exp(-0.5 * x * x);
    let tail = normal_tail(abs(x), exp_square);
    return select(tail, 1.0 - tail, x > vec4<f32>()) + x * GELU_DENSITY * exp_square;
}
