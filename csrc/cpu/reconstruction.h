// Masked patches as regression targets, for whoever has predictions of them (reconstruction.cpp).
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace kdcmae_fast {

// pixels (B, ...), their statistics (C,) if they are uint8, and the plan of K views (B, L).
struct MaskedPatches {
  const at::Tensor& pixels;
  const std::optional<at::Tensor>& mean;
  const std::optional<at::Tensor>& std;
  const at::Tensor& rank_of_token;
  int64_t len_keep, num_views;
  at::IntArrayRef patch;
  bool norm_pix;
};

// Mean squared error of every row of pred (K*B, L or masked, P): (K*B,), float64 if pred or pixels
// are, else float32.
at::Tensor row_losses(const at::Tensor& pred, const MaskedPatches& patches, bool masked_only);

// out = weights[row] * (pred - target), 0 for visible tokens; out may be pred. weights (K*B,), of
// the dtype of the losses; out contiguous, as pred.
void scaled_errors(const at::Tensor& pred, const MaskedPatches& patches, bool masked_only,
                   const at::Tensor& weights, at::Tensor& out);

}  // namespace kdcmae_fast
