// Products of matrices by cuBLAS, with torch's handle and workspace, on the caller's stream. cuBLAS is called without
// torch's dispatcher, which costs more than a small product, and so that float32 obeys the flag that torch.nn's
// recurrent layers obey: torch.backends.cudnn.allow_tf32 (or cudnn.rnn.fp32_precision), not that of torch.matmul.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/irange.h>

#include <algorithm>

namespace nlpkernels {

// A matrix [rows, columns], or a batch of them, as it lies in a tensor: rows `stride` apart, or if transposed, columns.
struct Matrix {
  char* data;
  at::ScalarType dtype;
  int64_t batch, rows, columns, stride, batch_stride;
  bool is_transposed;

  explicit Matrix(const at::Tensor& tensor)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        dtype(tensor.scalar_type()),
        batch(tensor.dim() == 3 ? tensor.size(0) : 1),
        rows(tensor.size(-2)),
        columns(tensor.size(-1)),
        batch_stride(tensor.dim() == 3 ? tensor.stride(0) : 0) {
    // Of a single row or column torch leaves the stride open.
    is_transposed = columns > 1 && tensor.stride(-1) != 1;
    const int64_t apart = is_transposed ? columns : rows, length = is_transposed ? rows : columns;
    const int64_t given = tensor.stride(is_transposed ? -1 : -2);
    stride = std::max<int64_t>(apart > 1 ? given : length, 1);
    TORCH_INTERNAL_ASSERT(stride >= length && (!is_transposed || rows <= 1 || tensor.stride(-2) == 1));
  }

  Matrix first_rows(int64_t count) const {
    Matrix result = *this;
    result.rows = count;
    return result;
  }

  Matrix of_batch(int64_t i) const {
    Matrix result = *this;
    result.batch = 1;
    result.data += i * batch_stride * static_cast<int64_t>(c10::elementSize(dtype));
    return result;
  }
};

// Whether products of float32 may be of TF32.
inline bool allows_tf32() { return at::globalContext().allowTF32CuDNN(at::Float32Op::RNN); }

class Blas {
 public:
  // For products of matrices of this dtype.
  explicit Blas(at::ScalarType dtype) : handle_(at::cuda::getCurrentCUDABlasHandle()) {
    // torch sets the mode anew whenever it gives the handle to someone.
    const bool is_half = dtype == at::kHalf || dtype == at::kBFloat16;
    check(cublasSetMathMode(handle_, is_half ? CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION
                                     : dtype == at::kFloat && allows_tf32() ? CUBLAS_TF32_TENSOR_OP_MATH
                                                                            : CUBLAS_DEFAULT_MATH));
  }

  // out = a b, or out += a b, batch by batch; accumulated in float at least. out may be wider than a and b.
  void multiply(const Matrix& out, const Matrix& a, const Matrix& b, bool add = false) const {
    TORCH_INTERNAL_ASSERT(!out.is_transposed && a.rows == out.rows && a.columns == b.rows && b.columns == out.columns &&
                          a.batch == out.batch && b.batch == out.batch && a.dtype == b.dtype);
    if (out.rows == 0 || out.columns == 0) return;
    if (a.columns == 0) {
      if (!add) fill_with_zeros(out);
      return;
    }
    const bool is_double = out.dtype == at::kDouble;
    const double alpha = 1, beta = add ? 1 : 0;
    const float float_alpha = 1, float_beta = add ? 1 : 0;
    // cuBLAS counts along columns: what it takes for out^T = b^T a^T is our out.
    check(cublasGemmStridedBatchedEx_64(handle_, operation(b), operation(a), out.columns, out.rows, a.columns,
                                        is_double ? static_cast<const void*>(&alpha) : &float_alpha, b.data, type(b),
                                        b.stride, b.batch_stride, a.data, type(a), a.stride, a.batch_stride,
                                        is_double ? static_cast<const void*>(&beta) : &float_beta, out.data, type(out),
                                        out.stride, out.batch_stride, out.batch,
                                        is_double ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

 private:
  static cublasOperation_t operation(const Matrix& matrix) { return matrix.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

  static cudaDataType_t type(const Matrix& matrix) {
    switch (matrix.dtype) {
      case at::kDouble:
        return CUDA_R_64F;
      case at::kFloat:
        return CUDA_R_32F;
      case at::kHalf:
        return CUDA_R_16F;
      case at::kBFloat16:
        return CUDA_R_16BF;
      default:
        TORCH_INTERNAL_ASSERT(false, "no product of ", matrix.dtype);
    }
  }

  static void fill_with_zeros(const Matrix& out) {
    const size_t size = c10::elementSize(out.dtype);
    for (const auto i : c10::irange(out.batch)) {
      C10_CUDA_CHECK(cudaMemset2DAsync(out.of_batch(i).data, out.stride * size, 0, out.columns * size, out.rows,
                                       c10::cuda::getCurrentCUDAStream()));
    }
  }

  static void check(cublasStatus_t status) {
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "nlpkernels: cuBLAS failed: ", cublasGetStatusString(status));
  }

  cublasHandle_t handle_;
};

}  // namespace nlpkernels
