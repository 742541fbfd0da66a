// The Python module kdcmae_fast._C. Importing it loads the library, whose static initialisers
// register the operators with torch (TORCH_LIBRARY_IMPL in csrc/cpu/*.cpp). It holds one number,
// `interface`, by which kernels/common/dispatch.py tells a build of other sources from its own.

#include <Python.h>

constexpr long kInterface = 2;  // as INTERFACE in dispatch.py

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Compiled kdcmae_fast operators.", -1, nullptr,
  };
  PyObject* made = PyModule_Create(&module);
  if (made != nullptr && PyModule_AddIntConstant(made, "interface", kInterface) != 0) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}
