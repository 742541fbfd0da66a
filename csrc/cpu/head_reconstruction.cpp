// The head of a masked autoencoder with its reconstruction loss: kernels/reconstruction/README.md.
//
// Some samples at a time, so that their predictions stay in the cache: one product for all views of
// them, then the loss of reconstruction.cpp, or its gradient written over the predictions.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "patches.h"
#include "reconstruction.h"

namespace kdcmae_fast {
namespace {

constexpr int64_t kBlockElements = 1 << 20;  // predictions alive at once
constexpr int64_t kGrainRows = 32;

// The operands of one call; samples [start, start + count) of every view at a time.
struct Head {
  Head(const at::Tensor& x_in, const at::Tensor& weight_in, const std::optional<at::Tensor>& bias_in,
       const at::Tensor& pixels_in, const std::optional<at::Tensor>& mean_in,
       const std::optional<at::Tensor>& std_in, const at::Tensor& rank_of_token, int64_t keep,
       int64_t num_views, at::IntArrayRef patch_in, bool norm, bool masked_only)
      : x(x_in.stride(-1) == 1 || x_in.size(-1) <= 1 ? x_in : x_in.contiguous()),
        weight(weight_in.contiguous()), pixels(pixels_in), plan(rank_of_token.contiguous()),
        mean(mean_in), std(std_in), patch(patch_in), len_keep(keep), views(num_views),
        norm_pix(norm), only_masked(masked_only) {
    if (bias_in) bias = bias_in->to(weight.scalar_type());
    TORCH_CHECK_VALUE(plan.dim() == 2, "a plan must be (B, L), got ", plan.sizes());
    batch = plan.size(0);
    tokens = plan.size(1);
    masked = tokens - keep;
    check_order(plan, batch, tokens);
    check_views(tokens, keep, views);
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == views * batch && masked > 0 &&
                          x.size(1) == (only_masked ? masked : tokens), "x has shape ", x.sizes());
    TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == x.size(2) &&
                          weight.scalar_type() == x.scalar_type(), "weight has shape ",
                      weight.sizes(), " and dtype ", weight.scalar_type());
    step = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(
                                                     1, views * masked * weight.size(0)));
  }

  // visit(rows) for the tokens [0, views * count * tokens) of a block: the row of x, counted over
  // all tokens, and the row of the block, or -1 for a visible token.
  template <class Visit>
  void visit_rows(int64_t start, int64_t count, const Visit& visit) const {
    const int16_t* ranks = plan.const_data_ptr<int16_t>();
    const int64_t length = x.size(1);
    at::parallel_for(0, views * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t view = i / count, b = start + i % count, row = view * batch + b;
        for (int64_t token = 0; token < length; ++token) {
          int64_t index = token;
          if (!only_masked) {
            index = ranks[b * tokens + token] - (view + 1) * len_keep;
            if (index < 0) index += tokens;
          }
          visit(row, token, index < masked ? i * masked + index : -1);
        }
      }
    });
  }

  // The rows of x that predict masked patches, (views * count * masked, D').
  at::Tensor inputs(int64_t start, int64_t count) const {
    const int64_t dim = x.size(2);
    if (only_masked && views == 1) return x.narrow(0, start, count).reshape({-1, dim});
    at::Tensor out = at::empty({views * count * masked, dim}, x.options());
    const int64_t size = x.element_size(), bytes = dim * size;
    const char* from = static_cast<const char*>(x.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    visit_rows(start, count, [&](int64_t row, int64_t token, int64_t place) {
      if (place < 0) return;
      const int64_t offset = (row * x.stride(0) + token * x.stride(1)) * size;
      std::memcpy(to + place * bytes, from + offset, bytes);
    });
    return out;
  }

  // The inverse: rows of a block to their places in dx (contiguous), zeros to visible tokens.
  void place(const at::Tensor& block_in, int64_t start, int64_t count, at::Tensor& dx) const {
    const at::Tensor block = block_in.contiguous();
    const int64_t bytes = dx.size(2) * dx.element_size();
    const char* from = static_cast<const char*>(block.const_data_ptr());
    char* to = static_cast<char*>(dx.mutable_data_ptr());
    visit_rows(start, count, [&](int64_t row, int64_t token, int64_t source) {
      char* target = to + (row * dx.size(1) + token) * bytes;
      if (source < 0) {
        std::memset(target, 0, bytes);
      } else {
        std::memcpy(target, from + source * bytes, bytes);
      }
    });
  }

  // Predictions of a block, (views * count, masked, P), in memory that the next block overwrites.
  at::Tensor predict(const at::Tensor& inputs, int64_t count) {
    const int64_t rows = inputs.size(0), values = weight.size(0);
    if (!buffer.defined()) buffer = at::empty({rows, values}, inputs.options());
    at::Tensor out = buffer.narrow(0, 0, rows);
    if (bias) {
      at::addmm_out(out, *bias, inputs, weight.t());
    } else {
      at::mm_out(out, inputs, weight.t());
    }
    return out.view({views * count, masked, values});
  }

  // (views * count,): the block's part of (K*B,).
  at::Tensor own(const at::Tensor& rows, int64_t start, int64_t count) const {
    return rows.view({views, batch}).narrow(1, start, count).reshape({-1});
  }

  template <class Visit>
  void each_block(const Visit& visit) const {
    for (int64_t start = 0; start < batch; start += step) {
      const int64_t count = std::min(step, batch - start);
      const at::Tensor pixel = pixels.narrow(0, start, count), ranks = plan.narrow(0, start, count);
      visit(start, count,
            MaskedPatches{pixel, mean, std, ranks, len_keep, views, patch, norm_pix});
    }
  }

  at::Tensor x, weight, pixels, plan, buffer;
  std::optional<at::Tensor> bias, mean, std;
  at::IntArrayRef patch;
  int64_t len_keep, views;
  bool norm_pix, only_masked;
  int64_t batch = 0, tokens = 0, masked = 0, step = 1;
};

at::ScalarType loss_type(const Head& head) {
  const bool wide = head.x.scalar_type() == at::kDouble || head.pixels.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// Sums over blocks, one after the other.
struct Gradients {
  explicit Gradients(const Head& of)
      : head(of), dx(at::empty(of.x.sizes(), of.x.options())),
        dweight(at::zeros(of.weight.sizes(), wide(of))),
        dbias(at::zeros({of.weight.size(0)}, wide(of))) {}

  static at::TensorOptions wide(const Head& head) {
    const bool wide = head.x.scalar_type() == at::kDouble;
    return head.weight.options().dtype(wide ? at::kDouble : at::kFloat);
  }

  // dpred: the gradient by a block's predictions.
  void add(const at::Tensor& dpred, const at::Tensor& inputs, int64_t start, int64_t count) {
    const at::Tensor rows = dpred.flatten(0, 1);
    dbias.add_(rows.sum(0, false, dbias.scalar_type()));
    if (rows.scalar_type() == dweight.scalar_type()) {
      dweight.addmm_(rows.t(), inputs);
    } else {
      dweight.add_(at::mm(rows.t(), inputs));
    }
    head.place(at::mm(rows, head.weight), start, count, dx);
  }

  const Head& head;
  at::Tensor dx, dweight, dbias;
};

// Loss (K*B,). No statistics are kept: (0, 0) twice.
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& pixels, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& std, const at::Tensor& /* token_of_rank */,
    const at::Tensor& rank_of_token, int64_t len_keep, int64_t num_views, at::IntArrayRef patch,
    bool norm_pix, bool masked_only) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Head head(x, weight, bias, pixels, mean, std, rank_of_token, len_keep, num_views, patch,
                  norm_pix, masked_only);
  at::Tensor out = at::empty({head.views, head.batch}, x.options().dtype(loss_type(head)));
  head.each_block([&](int64_t start, int64_t count, const MaskedPatches& patches) {
    const at::Tensor pred = head.predict(head.inputs(start, count), count);
    out.narrow(1, start, count).copy_(row_losses(pred, patches, true).view({head.views, count}));
  });
  return {out.view(-1), at::empty({0, 0}, out.options()), at::empty({0, 0}, out.options())};
}

// row_weight (K*B,): gradient by half the squared errors of a row. dx as x; dweight and dbias in
// float32 at least.
std::tuple<at::Tensor, at::Tensor, at::Tensor> loss_backward(
    const at::Tensor& row_weight, const at::Tensor& /* patch_mean */,
    const at::Tensor& /* patch_rstd */, const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& pixels,
    const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std,
    const at::Tensor& /* token_of_rank */, const at::Tensor& rank_of_token, int64_t len_keep,
    int64_t num_views, at::IntArrayRef patch, bool norm_pix, bool masked_only) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Head head(x, weight, bias, pixels, mean, std, rank_of_token, len_keep, num_views, patch,
                  norm_pix, masked_only);
  TORCH_CHECK_VALUE(row_weight.dim() == 1 && row_weight.size(0) == head.views * head.batch,
                    "row_weight has shape ", row_weight.sizes());
  const at::Tensor weights = row_weight.to(loss_type(head)).contiguous();
  Gradients sums(head);
  head.each_block([&](int64_t start, int64_t count, const MaskedPatches& patches) {
    const at::Tensor inputs = head.inputs(start, count);
    at::Tensor pred = head.predict(inputs, count);
    scaled_errors(pred, patches, true, head.own(weights, start, count), pred);
    sums.add(pred, inputs, start, count);
  });
  return {sums.dx, sums.dweight, sums.dbias};
}

// The loss and, from the same predictions, the gradients for a row_weight of 1.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_and_gradients(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& pixels, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& std, const at::Tensor& /* token_of_rank */,
    const at::Tensor& rank_of_token, int64_t len_keep, int64_t num_views, at::IntArrayRef patch,
    bool norm_pix, bool masked_only) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Head head(x, weight, bias, pixels, mean, std, rank_of_token, len_keep, num_views, patch,
                  norm_pix, masked_only);
  const auto options = x.options().dtype(loss_type(head));
  at::Tensor out = at::empty({head.views, head.batch}, options);
  const at::Tensor ones = at::ones({head.views * head.batch}, options);
  Gradients sums(head);
  head.each_block([&](int64_t start, int64_t count, const MaskedPatches& patches) {
    const at::Tensor inputs = head.inputs(start, count);
    at::Tensor pred = head.predict(inputs, count);
    out.narrow(1, start, count).copy_(row_losses(pred, patches, true).view({head.views, count}));
    scaled_errors(pred, patches, true, head.own(ones, start, count), pred);
    sums.add(pred, inputs, start, count);
  });
  return {out.view(-1), sums.dx, sums.dweight, sums.dbias};
}

}  // namespace

// The schemas are defined in kernels/reconstruction/head_autograd.py.
TORCH_LIBRARY_IMPL(kdcmae_fast, CPU, m) {
  m.impl("head_reconstruction_loss_cpp", loss);
  m.impl("head_reconstruction_loss_backward_cpp", loss_backward);
  m.impl("head_reconstruction_loss_and_gradients_cpp", loss_and_gradients);
}

}  // namespace kdcmae_fast
